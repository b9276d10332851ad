"""How far what was written follows each parent: its own trace, and its choice at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooks import HookedVLM
from hooks.batches import at_once, fitting, forward_bytes, in_shared_parts, item_bytes, logits_bytes
from interp.lockstep.run import Written
from interp.metrics.logits import sparing_logits
from interp.prompts import Prompt, collate


@dataclass(frozen=True)
class Followed:
    """How far a trace follows a parent.

    Attributes:
        prefix: tokens, from the first, that are those of the parent's own trace.
        own: length of that.
        whole: it is the parent's own trace.
        share: of the steps, on the same tokens, at which the parent would have chosen what was written.
    """

    prefix: int
    own: int
    whole: bool
    share: float


def follow(
    parent: HookedVLM, written: Sequence[Written], own: Sequence[Sequence[int]], batch_size: int = 32
) -> list[Followed]:
    """How far each trace follows a parent, run over it once, as it is.

    Args:
        parent: the donor or the recipient.
        written: what `lockstep` returned.
        own: the parent's own tokens after each prompt (`interp.pair.generation.greedy`).
        batch_size: prompts a forward.
    """
    chosen = _choices(
        parent, [one.prompt for one in written], [len(one.tokens) for one in written], batch_size
    )
    return [
        Followed(
            common_prefix(one.tokens, theirs),
            len(theirs),
            list(one.tokens) == list(theirs),
            sum(a == b for a, b in zip(one.tokens, choices, strict=True)) / len(one.tokens),
        )
        for one, theirs, choices in zip(written, own, chosen, strict=True)
    ]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@torch.no_grad()
def _choices(
    vlm: HookedVLM, traces: Sequence[Prompt], steps: Sequence[int], batch_size: int
) -> list[list[int]]:
    """The arg max before each of the last `steps` tokens; logits are made for these alone, a few at a time."""
    order = sorted(range(len(traces)), key=lambda row: len(traces[row]))
    found: dict[int, list[int]] = {}
    name = "ln_final.hook_normalized"

    def run_over(rows: Sequence[int]) -> list[list[int]]:
        inputs = collate([traces[row] for row in rows], "left").to(vlm.device).inputs
        with sparing_logits(vlm) as extra:
            _, cache = vlm.run_with_cache(inputs, [name], use_cache=False, **extra)
        states = [cache[name][i, -1 - steps[row] : -1] for i, row in enumerate(rows)]
        suppressed = torch.tensor(traces[0].builder.suppressed_ids, dtype=torch.long)
        chosen = [
            _arg_max(vlm, some, suppressed)
            for some in torch.cat(states).split(at_once(vlm.n_logits, vlm.device))
        ]
        pieces = torch.cat(chosen).split([steps[row] for row in rows])
        return [piece.tolist() for piece in pieces]

    width = max(map(len, traces), default=1)
    of_row = forward_bytes(vlm, width) + width * vlm.d_model * item_bytes(vlm)
    size = fitting(vlm, batch_size, of_row, "reading traces", logits_bytes(vlm, width))
    for rows, pieces in in_shared_parts("following traces", order, size, run_over):
        found |= dict(zip(rows, pieces, strict=True))
    return [found[row] for row in range(len(traces))]


def _arg_max(vlm: HookedVLM, states: Tensor, suppressed: Int[Tensor, " token"]) -> Int[Tensor, " pos"]:
    unembed: Any = vlm.module(vlm.anatomy.unembed)
    logits = unembed(states).float()
    return logits.index_fill(-1, suppressed.to(logits.device), -torch.inf).argmax(-1).cpu()
