"""What reading and writing cost: forward passes along traces, logits where they are read, greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Bool
from torch import Tensor

from hooks.batches import batched
from interp.map.component_map import batches_of
from interp.plan.arithmetic import Arithmetic
from interp.plan.images import pictures_of
from interp.plan.memory import Footprint
from interp.plan.structure import Weightless
from interp.plan.work import Work, together
from interp.prompts import Prompt, PromptBatch, collate

Reads = Callable[[PromptBatch], Bool[Tensor, "batch pos"]]
"""The tokens of a batch whose logits are read."""


class Runs:
    """What one model does with prompts, `batch_size` at a time.

    Args:
        vlm: the model.
        batch_size: prompts that run together.
    """

    def __init__(self, vlm: Weightless, batch_size: int) -> None:
        self.vlm, self.batch_size = vlm, batch_size
        self.arithmetic, self.footprint = Arithmetic(vlm), Footprint(vlm)

    def written(self, what: str, prompts: Sequence[Prompt], steps: Sequence[int]) -> Work:
        """Greedy generation: the prompt once, then a token at a time until the longest row of a batch has ended.

        Args:
            what: it is, in words.
            prompts: what is continued.
            steps: tokens that each row writes.
        """
        found = []
        for rows in batches_of(prompts, self.batch_size):
            some, longest = [prompts[row] for row in rows], max(steps[row] for row in rows)
            if longest < 1:
                continue
            width, n = max(map(len, some)), len(some)
            flops = self.arithmetic.forward(n, width, pictures_of(self.vlm, some), n)
            flops += self.arithmetic.written(n, width, longest)
            keys = self.footprint.keys(n, width + longest)
            held = {
                "keys and values of what is written": keys + keys // self.vlm.n_layers,
                "logits that are read": self.footprint.logits(n),
                "a forward pass": self.footprint.forward(n, width),
            }
            found.append(Work(what, longest, flops, held, uses=1))
        return together(what, found)

    def read(self, what: str, prompts: Sequence[Prompt], reads: Reads, passes: int = 1) -> Work:
        """A forward pass, and logits at the tokens that are read; `passes` times."""
        found = []
        for some in batched(prompts, self.batch_size):
            batch = collate(some, "left")
            places = int(reads(batch).sum())
            (rows, width), pictures = batch.roles.shape, pictures_of(self.vlm, some)
            flops = self.arithmetic.forward(rows, width, pictures, rows + places)
            held = {
                "what logits are made of": self.footprint.stream(rows, width),
                "a forward pass": self.footprint.forward(rows, width),
                "logits that are read": self.footprint.logits(places),
            }
            found.append(Work(what, 1, flops, held).times(passes))
        return together(what, found)

    def looked_at(self, what: str, prompts: Sequence[Prompt], target: str) -> Work:
        """A forward pass whose patterns are summed up from a role's queries."""
        vlm, found = self.vlm, []
        for chosen in batches_of(prompts, self.batch_size):
            some = [prompts[row] for row in chosen]
            batch = collate(some)
            (rows, width), queries = batch.roles.shape, int(batch.mask(target).any(0).sum())
            heads = sum(block.n_heads for block in vlm.anatomy.text.blocks)
            flops = self.arithmetic.forward(rows, width, pictures_of(vlm, some), rows)
            held = {"a forward pass and its patterns": self.footprint.forward(rows, width, looked_at=True)}
            found.append(Work(what, 1, flops + 2 * rows * heads * queries * (width + 1), held))
        return together(what, found)


def of_trace(batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
    """The tokens of a batch whose next one is of the trace."""
    reads = batch.mask("all") & False
    for row, prompt in enumerate(batch.prompts):
        end = int(batch.last[row])
        reads[row, end - len(prompt) + prompt.n_prompt_tokens : end] = True
    return reads


def of_decision(batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
    """The last token of each row."""
    return batch.mask("decision")
