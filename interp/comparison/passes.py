"""Products with a matrix that is larger than memory likes: a piece at a time, in one pass over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import get_blas_funcs
from torch import Tensor

from hooks.linears import product

Blocks = Callable[[], Iterator[Float[Tensor, "long short"]]]
"""Gives a matrix anew in blocks along its longer side, in any float type; of one wider than tall, its transpose."""

_PIECE = {
    4: 1 << 20,
    8: 1 << 18,
}  # entries converted at once, by bytes of each: both products find them in the cache
_GRAM_PIECE = 1 << 22  # wider, since a Gram matrix is read and written once a piece
_STRIP_PIECE, _STRIPS = 1 << 22, 16


class Passes:
    """A matrix M (long, short) that is read from end to end as often as it is multiplied with.

    Its products in float64 are NumPy's: of a tall piece and a few columns, its BLAS makes twice what PyTorch's does.
    Those in float32 are `hooks.linears.product`'s.

    Args:
        blocks: M.
        shape: of the matrix, M or its transpose.

    Attributes:
        short: columns of M.
    """

    def __init__(self, blocks: Blocks, shape: Sequence[int]) -> None:
        self._blocks = blocks
        self.short = min(shape)

    def gram_times(self, vectors: Float[np.ndarray, "short k"]) -> Float[np.ndarray, "short k"]:
        """M^T (M X), in the type of X; one pass."""
        if vectors.dtype == np.float32:
            return self._gram_times_single(torch.from_numpy(vectors.T.copy()))
        return self.both_times(vectors)[1]

    def both_times(
        self, vectors: Float[np.ndarray, "short k"]
    ) -> tuple[Float[np.ndarray, "long k"], Float[np.ndarray, "short k"]]:
        """M X and M^T (M X), in float64; one pass."""
        lying, across = vectors.T.copy(), []
        image = np.zeros_like(lying)
        with np.errstate(over="ignore", invalid="ignore"):  # who calls looks whether it is finite
            for piece in self.pieces(vectors.dtype):
                across.append(lying @ piece.T)
                image += across[-1] @ piece
        return np.concatenate(across, 1).T, np.ascontiguousarray(image.T)

    def _gram_times_single(self, lying: Float[Tensor, "k short"]) -> Float[np.ndarray, "short k"]:
        found = torch.zeros_like(lying)
        for some in self.pieces(np.dtype(np.float32)):
            piece = torch.from_numpy(some)
            if piece.is_contiguous():
                found += product(product(piece, lying).T.contiguous(), piece.T)
            else:
                found += product(piece.T, product(lying, piece)).T
        return found.T.contiguous().numpy()

    def times(self, vectors: Float[np.ndarray, "short k"]) -> Float[np.ndarray, "long k"]:
        """M X, in the type of X; one pass."""
        return np.concatenate([piece @ vectors for piece in self.pieces(vectors.dtype)])

    def gram(self, kind: type[np.floating], scale: float = 1.0) -> Float[np.ndarray, "short short"]:
        """M^T M of M / `scale`, added up in float32 or float64; one pass. Its lower triangle, all that LAPACK reads."""
        if kind == np.float32:
            return self._gram_in_single(scale)
        rank_k: Any = get_blas_funcs("syrk", dtype=kind)
        found = np.zeros((self.short, self.short), kind, order="F")
        for piece in self.pieces(np.dtype(kind), _GRAM_PIECE):
            if scale != 1:
                piece /= scale
            rows = (
                piece.T if piece.flags.c_contiguous else piece
            )  # Fortran's order either way: nothing is copied
            found = rank_k(1.0, rows, 1.0, found, int(rows is piece), 1, 1)
        return found

    def _gram_in_single(self, scale: float) -> Float[np.ndarray, "short short"]:
        """By strips of the lower triangle."""
        found = torch.zeros(self.short, self.short)
        edges = [self.short * i // _STRIPS for i in range(_STRIPS + 1)]
        for lying in self._lying(max(1, _STRIP_PIECE // self.short)):
            if scale != 1:
                lying /= scale
            for first, last in pairwise(edges):
                found[first:last, :last] += product(lying[first:last], lying[:last])
        for first, last in pairwise(edges):
            found[first:last, first:last].tril_()
        return found.numpy()

    def _lying(self, step: int) -> Iterator[Float[Tensor, "short some"]]:
        """M^T in pieces of `step` columns, in float32; each is overwritten by the next."""
        desk, filled = torch.empty(self.short, step), 0
        for block in self._blocks():
            while len(block):
                part = block[: step - filled]
                desk[:, filled : filled + len(part)] = part.float().T
                filled, block = filled + len(part), block[len(part) :]
                if filled == step:
                    yield desk
                    filled = 0
        if filled:
            yield desk[:, :filled].contiguous()

    def pieces(self, kind: np.dtype, entries: int | None = None) -> Iterator[Float[np.ndarray, "some short"]]:
        """M in pieces of rows, converted; each is overwritten by the next."""
        step = max(1, (entries or _PIECE[kind.itemsize]) // self.short)
        desk: dict[tuple[torch.dtype, bool], Tensor] = {}
        wanted = torch.float32 if kind == np.float32 else torch.float64
        for block in self._blocks():
            lying = block.stride(0) < block.stride(1)  # a transpose: its columns are what is contiguous
            for part in block.split(step):
                if part.dtype not in (torch.float32, wanted):  # PyTorch widens to float32 ten times as fast
                    part = _laid(part, torch.float32, lying, step, desk)
                yield _laid(part, wanted, lying, step, desk).numpy()


def _laid(
    part: Float[Tensor, "some short"],
    kind: torch.dtype,
    lying: bool,
    step: int,
    desk: dict[tuple[torch.dtype, bool], Tensor],
) -> Float[Tensor, "some short"]:
    """A copy in another type and the same order, where the last one lay."""
    rows, short = part.shape
    key = (kind, lying)
    if key not in desk:
        desk[key] = torch.empty(short * step, dtype=kind)
    flat = desk[key][: rows * short]
    return (flat.view(short, rows).T if lying else flat.view(rows, short)).copy_(part)
