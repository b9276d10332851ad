"""A model run over traces that are already written: its logits for every token of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import HookedVLM
from interp.prompts import Prompt, collate


@dataclass(frozen=True)
class Divergence:
    """A position of a trace at which another model chooses another next token.

    Attributes:
        index: which token of the trace, from 0.
        other_token: what the other model would write there.
    """

    index: int
    other_token: int


def trace_logits(
    vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int, progress: bool = False
) -> Iterator[tuple[Prompt, Float[Tensor, "step vocab"]]]:
    """Each trace with the logits for each of its tokens, given those before it (float32, CPU)."""
    for first in tqdm(range(0, len(traces), batch_size), desc="trace", unit="batch", disable=not progress):
        rows = traces[first : first + batch_size]
        steps = [len(row.trace_ids) for row in rows]
        kept = max(steps) + 1  # left padding: the last columns are the traces
        inputs = collate(rows, "left").to(vlm.model.device).inputs
        logits = vlm(inputs, logits_to_keep=kept).logits.float().cpu()
        for i, row in enumerate(rows):
            yield row, logits[i, kept - 1 - steps[i] : kept - 1]


def next_tokens(trace: Prompt, logits: Float[Tensor, "step vocab"]) -> Int[Tensor, " step"]:
    """The token that greedy generation would choose at each step."""
    allowed = logits.clone()
    allowed[:, list(trace.builder.suppressed_ids)] = -torch.inf
    return allowed.argmax(dim=-1)


def diverging(
    trace: Prompt, writer: Int[Tensor, " step"], other: Int[Tensor, " step"]
) -> tuple[list[Divergence], int]:
    """Where the other model would not write what the trace's writer wrote.

    Positions where the writer itself, run over its trace at once, would choose another token than it did step by step
    (a tie to rounding) are left out.

    Returns:
        The divergences in order, and the number of positions left out.
    """
    stable = writer == torch.tensor(trace.trace_ids)
    places = torch.nonzero(stable & (other != writer)).flatten().tolist()
    return [Divergence(i, int(other[i])) for i in places], int((~stable).sum())
