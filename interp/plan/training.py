"""What training computes and holds: forward and backward of what is learnt, and the samples that RL writes.

A matrix product costs two more on the way back: one for its input, one for its weights, which falls away where these
are frozen. Attention's two products cost two each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hooks.weights import weight_slices
from interp.plan.images import Pictures, pictures_of
from interp.plan.memory import WIDE
from interp.plan.runs import Runs
from interp.plan.work import Work, together
from interp.prompts import Prompt

MOMENTS = 2
"""That Adam keeps of every weight."""
OF_LOGITS = 4
"""Logits, their logarithms, and the gradients of both."""


class TrainingPlan:
    """A model that is trained.

    Args:
        runs: of the model.
        frozen: addresses that get no gradient.
        sees: whether the vision tower is trained; what leads from it to the decoder goes with it.
        checkpointed: whether blocks are computed again on the way back, and only streams are kept.
    """

    def __init__(
        self, runs: Runs, frozen: Sequence[str] = (), sees: bool = True, checkpointed: bool = False
    ) -> None:
        self.runs, self._sees, self._checkpointed = runs, sees, checkpointed
        vlm = runs.vlm
        self._named = dict(vlm.model.named_parameters())
        whole = {
            one.parameter
            for name in frozen
            for one in weight_slices(vlm.model, vlm.anatomy, name)
            if one.dim is None
        }
        towers = [path for path in (vlm.anatomy.vision.path, vlm.anatomy.projector_weights) if path]
        of_images = {name for name in self._named if _under(name, towers)}
        self._rested = (whole & set(self._named)) | (set() if sees else of_images)
        text = whole - of_images
        self._spared = 2 * sum(self._named[name].numel() for name in text if self._named[name].ndim == 2)

    def step(self, rows: int, tokens: int, pictures: Pictures, read: int, images: bool = False) -> Work:
        """One forward and one backward.

        Args:
            rows, tokens, pictures, read: as in `Arithmetic.forward`.
            images: the vision tower alone.
        """
        arithmetic = self.runs.arithmetic
        seen = arithmetic.images(pictures)
        decoder = 0 if images else arithmetic.forward(rows, tokens, Pictures(), read)
        again = self._checkpointed * (decoder - read * arithmetic.unembedding + seen)
        flops = decoder + seen + 2 * decoder + 2 * self._sees * seen + again
        flops -= 0 if images else rows * tokens * self._spared
        held = {
            **self.kept(),
            "what the gradient flows back through": self._saved(rows, tokens, pictures, images),
        }
        held["logits that are learnt"] = 0 if images else OF_LOGITS * WIDE * read * self.runs.vlm.n_logits
        return Work("step", 1, flops, held)

    def kept(self) -> dict[str, int]:
        """Weights, gradients and what Adam keeps of those that are learnt."""
        sizes = {name: one.numel() * one.element_size() for name, one in self._named.items()}
        learnt = sum(size for name, size in sizes.items() if name not in self._rested)
        return {
            "weights in training": sum(sizes.values()),
            "gradients, and what Adam keeps": (1 + MOMENTS) * learnt,
        }

    def _saved(self, rows: int, tokens: int, pictures: Pictures, images: bool) -> int:
        footprint, layers = self.runs.footprint, self.runs.vlm.n_layers
        seen = footprint.kept_of_tower(pictures) if self._sees else 0
        if images:
            return seen
        if self._checkpointed:
            return seen + layers * footprint.stream(rows, tokens) + footprint.saved(rows, tokens, 1)
        return seen + footprint.saved(rows, tokens)

    def group_step(self, prompts: Sequence[Prompt], samples: int, tokens: int, shared: bool) -> Work:
        """A step of GRPO: every prompt continued by so many samples, then learnt from.

        Args:
            prompts: of one step.
            samples: of each.
            tokens: of a sample.
            shared: whether a prompt's samples stand in one row behind it; else each has a row of its own, a prompt's
                rows at a time.
        """
        runs = Runs(self.runs.vlm, len(prompts) * samples)
        every = [prompt for prompt in prompts for _ in range(samples)]
        written = replace(runs.written("samples", every, [tokens] * len(every)), what="samples")
        written = _beside(written, self.kept())
        width = max(map(len, prompts))
        if shared:
            whole, read = width + samples * tokens, len(every) * tokens
            return together(
                "step", [written, self.step(len(prompts), whole, pictures_of(runs.vlm, prompts), read)]
            )
        rows = pictures_of(runs.vlm, [prompts[0]] * samples)
        one = self.step(samples, width + tokens, rows, samples * (tokens + 1))
        return together("step", [written, one.times(len(prompts))])


def _beside(work: Work, held: dict[str, int]) -> Work:
    for item, size in held.items():
        work = work.beside(item, size)
    return work


def _under(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)
