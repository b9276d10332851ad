"""The soft metric of two models on their traces, without a number for every word.

Its weights, p_after - p_before at every step, are a vocabulary a step. Where all of them together are more than
`DENSE`, what both models give their unembeddings is kept in their place, a hundredth of that (of many prompts in a
temporary file), beside a copy of both unembeddings; a step's weights are made from it when the metric reads the step.
They are the same to the last bits of float32 and stay what they are, whatever happens to the models' weights
afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from hooks import HookedVLM
from hooks.spilled import Spill
from interp.decision.traces import Head, StepLogits, trace_logits
from interp.metrics import HELD, SoftDifference
from interp.prompts import Prompt

DENSE = HELD
"""Weights that are kept as they are."""


@dataclass(frozen=True, eq=False)
class Change:
    """p_after - p_before of a trace's next tokens [step vocab]."""

    after: StepLogits
    before: StepLogits

    def __len__(self) -> int:
        return len(self.after)

    def __getitem__(self, steps: slice) -> Float[Tensor, "some vocab"]:
        after, before = (side[steps].softmax(-1) for side in (self.after, self.before))
        return after - before.to(after.device)

    def held(self, most: int) -> Change:
        """One that makes its weights once, where they are no more than that."""
        small = len(self) * self.after.n_words <= most
        return Held(self.after, self.before) if small else Change(self.after, self.before)

    def dense(self) -> Float[Tensor, "step vocab"]:
        """All of it, in main memory."""
        parts = [Change.__getitem__(self, some).cpu() for some in self.after.chunks()]
        return torch.cat(parts) if parts else torch.zeros(0, self.after.n_words)


@dataclass(frozen=True, eq=False)
class Held(Change):
    """One whose weights are made once."""

    @cached_property
    def _made(self) -> Float[Tensor, "step vocab"]:
        return self.dense()

    def __getitem__(self, steps: slice) -> Float[Tensor, "some vocab"]:
        return self._made[steps]


@torch.no_grad()
def soft_difference(
    after: HookedVLM, before: HookedVLM, traces: Sequence[Prompt], batch_size: int, progress: bool = False
) -> SoftDifference:
    """The soft metric: log odds at every step of the traces, weighted by how the two models differ there, as they are.

    Args:
        after, before: whose probabilities are compared.
        traces: along which.
        batch_size: traces at a time.
        progress: show bars.
    """
    n_weights = sum(len(trace.trace_ids) for trace in traces) * after.n_logits
    heads = (None, None) if n_weights <= DENSE else (Head.of(after), Head.of(before))
    weights: list[Tensor | Change] = []
    spill = Spill()
    for new, old in both(after, before, traces, batch_size, progress):
        if heads[0] is None or heads[1] is None:
            weights.append(Change(new, old).dense())
        else:
            weights.append(Change(new.kept(heads[0], spill), old.kept(heads[1], spill)))
    start = torch.tensor([trace.n_prompt_tokens - 1 for trace in traces], dtype=torch.long)
    return SoftDifference(tuple(weights), start)


def both(
    a: HookedVLM, b: HookedVLM, traces: Sequence[Prompt], batch_size: int, progress: bool = False
) -> Iterator[tuple[StepLogits, StepLogits]]:
    """The logits of two models along the same traces."""
    runs = [trace_logits(vlm, traces, batch_size, progress) for vlm in (a, b)]
    for (_, of_a), (_, of_b) in zip(*runs, strict=True):
        yield of_a, of_b
