"""Sums over updates, tensor by tensor while the files are read: norms, sparsity, cosine. Memory: a few megabytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooks.errors import FrankenlensError
from hooks.stored.checkpoint import Checkpoint
from interp.comparison.stored import counted_in

BLOCK = 1 << 16
"""Entries worked on at once: they stay in a core's cache, and their sums are exact to 1e-6 in float32."""
_SQUARED = (1e-15, 1e15)  # entries between these have squares, and sums of them, in float32


@dataclass
class Sums:
    """Of one tensor's update in one stage.

    Attributes:
        squares, absolutes, largest: of the update's entries.
        reference: squares of IN's weights.
        unchanged: entries whose values are the same before and after, in the type of `counted_in`.
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

    Raises:
        FrankenlensError: an entry is infinite or NaN.
    """
    sums = [Sums() for _ in checkpoints[1:]]
    product, desk = 0.0, _Desk(checkpoints, name)
    for parts in zip(*(checkpoint.parts(name) for checkpoint in checkpoints), strict=True):
        for pieces in zip(*(part.split(BLOCK) for part in parts), strict=True):
            product += _add(sums, pieces, desk)
    if not all(math.isfinite(one.squares) for one in sums):
        broken = next(c for c in checkpoints if not all(part.isfinite().all() for part in c.parts(name)))
        raise FrankenlensError(f"{broken.folder}: {name} has entries that are infinite or NaN.")
    return sums, product


class _Desk:
    """Tensors that every block is worked on in: allocating them anew would take longer than the sums.

    Attributes:
        wide: the weights of each checkpoint, in one precision.
        deltas: the updates.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], name: str) -> None:
        stored = {checkpoint.tensors[name].dtype for checkpoint in checkpoints}
        dtype = torch.float64 if torch.float64 in stored else torch.float32
        n = min(BLOCK, checkpoints[0].tensors[name].entries)
        self.wide = torch.empty(len(checkpoints), n, dtype=dtype)
        self.deltas = torch.empty(len(checkpoints) - 1, n, dtype=dtype)
        self._other = torch.empty_like(self.deltas)

    def lay(self, pieces: Sequence[Shaped[Tensor, " entry"]]) -> None:
        """Takes the pieces and subtracts them."""
        n = len(pieces[0])
        if n != self.wide.shape[1]:  # the last block
            self.wide, self.deltas, self._other = (
                torch.empty(len(one), n, dtype=one.dtype) for one in (self.wide, self.deltas, self._other)
            )
        for row, piece in zip(self.wide, pieces, strict=True):
            row.copy_(piece)
        torch.sub(self.wide[1:], self.wide[:-1], out=self.deltas)

    def sizes(self) -> tuple[list[float], list[float]]:
        """Sum and largest of the absolute values of each update."""
        size = torch.abs(self.deltas, out=self._other)
        return size.sum(1).tolist(), size.amax(1).tolist()

    def changed(self, pieces: Sequence[Shaped[Tensor, " entry"]]) -> list[int]:
        """How many values each update changes, in the type of `counted_in`."""
        types = {piece.dtype for piece in pieces}
        if types in ({torch.bfloat16}, {torch.float16}):
            return list(map(round, torch.ne(self.deltas, 0, out=self._other).sum(1).tolist()))
        return [
            int((after.to(kind) != before.to(kind)).sum())
            for before, after in pairwise(pieces)
            for kind in [counted_in(before.dtype, after.dtype)]
        ]


def _add(sums: list[Sums], pieces: Sequence[Shaped[Tensor, " entry"]], desk: _Desk) -> float:
    desk.lay(pieces)
    absolutes, largest = desk.sizes()
    changed, n = desk.changed(pieces), len(pieces[0])
    outside = [size for size in largest if size and not _SQUARED[0] < size < _SQUARED[1]]
    deltas = desk.deltas.double() if outside else desk.deltas
    reference = _dot(desk.wide[-2], desk.wide[-2])
    for k, one in enumerate(sums):
        one.squares += _dot(deltas[k], deltas[k])
        one.absolutes += absolutes[k]
        one.largest = max(one.largest, largest[k])
        one.reference += reference
        one.unchanged += n - changed[k]
        one.n += n
    return _dot(deltas[0], deltas[-1])


def _dot(a: Float[Tensor, " entry"], b: Float[Tensor, " entry"]) -> float:
    return float(torch.dot(a, b))
