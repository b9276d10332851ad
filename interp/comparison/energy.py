"""Sums over updates, tensor by tensor while the files are read: norms, sparsity, cosine. Memory: a few megabytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from interp.comparison.checkpoint import Checkpoint

BLOCK = (
    1 << 16
)  # entries worked on at once: they stay in a core's cache; their sums are exact to 1e-6 in float32


@dataclass
class Sums:
    """Of one tensor's update in one stage.

    Attributes:
        squares, absolutes, largest: of the update's entries.
        reference: squares of IN's weights.
        unchanged: entries whose bfloat16 values are the same before and after.
        n: entries.
    """

    squares: float = 0.0
    absolutes: float = 0.0
    largest: float = 0.0
    reference: float = 0.0
    unchanged: int = 0
    n: int = 0


@torch.no_grad()
def energies(checkpoints: Sequence[Checkpoint], name: str) -> tuple[list[Sums], float]:
    """Sums of one tensor's update from each checkpoint to the next; each file is read once.

    Args:
        checkpoints: (IN, RL) or (Base, IN, RL).
        name: the tensor.

    Returns:
        One `Sums` per update, and the scalar product of the first and the last.
    """
    sums = [Sums() for _ in checkpoints[1:]]
    product = 0.0
    for parts in zip(*(checkpoint.parts(name) for checkpoint in checkpoints), strict=True):
        for pieces in zip(*(part.split(BLOCK) for part in parts), strict=True):
            product += _add(sums, pieces)
    return sums, product


def _add(sums: list[Sums], pieces: Sequence[Shaped[Tensor, " entry"]]) -> float:
    wide = [piece if piece.dtype == torch.float64 else piece.float() for piece in pieces]
    wide = [piece.double() for piece in wide] if len({piece.dtype for piece in wide}) > 1 else wide
    deltas = [after - before for before, after in pairwise(wide)]
    reference = _dot(wide[-2], wide[-2])
    for k, (one, delta) in enumerate(zip(sums, deltas, strict=True)):
        size = delta.abs()
        one.squares += _dot(delta, delta)
        one.absolutes += float(size.sum())
        one.largest = max(one.largest, float(size.amax()))
        one.reference += reference
        one.unchanged += delta.numel() - _changed(pieces[k], pieces[k + 1], delta)
        one.n += delta.numel()
    return _dot(deltas[0], deltas[-1])


def _dot(a: Float[Tensor, " entry"], b: Float[Tensor, " entry"]) -> float:
    return float(torch.dot(a, b))


def _changed(
    before: Shaped[Tensor, " entry"], after: Shaped[Tensor, " entry"], delta: Float[Tensor, " entry"]
) -> int:
    if before.dtype == after.dtype == torch.bfloat16:
        return round(
            float(torch.ne(delta, 0, out=torch.empty_like(delta)).sum())
        )  # faster than count_nonzero
    return int((before.bfloat16() != after.bfloat16()).sum())
