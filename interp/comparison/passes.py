"""Products with a matrix that is larger than memory likes: a piece at a time, in one pass over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import get_blas_funcs
from torch import Tensor

Blocks = Callable[[], Iterator[Float[Tensor, "long short"]]]
"""Gives a matrix anew in blocks along its longer side, in any float type; of one wider than tall, its transpose."""

_PIECE = 1 << 18  # entries converted at once: they stay in a core's cache until both products have read them
_GRAM_PIECE = 1 << 22  # wider, since a Gram matrix is read and written once a piece


class Passes:
    """A matrix M (long, short) that is read from end to end as often as it is multiplied with.

    Its products are NumPy's: of a tall piece and a few columns in float64, its BLAS makes twice what PyTorch's does.

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
        found = np.zeros_like(vectors, order="C")
        with np.errstate(over="ignore", invalid="ignore"):  # who calls looks whether it is finite
            for piece in self.pieces(vectors.dtype):
                found += piece.T @ (piece @ vectors)
        return found

    def times(self, vectors: Float[np.ndarray, "short k"]) -> Float[np.ndarray, "long k"]:
        """M X, in the type of X; one pass."""
        return np.concatenate([piece @ vectors for piece in self.pieces(vectors.dtype)])

    def gram(self, kind: type[np.floating], scale: float = 1.0) -> Float[np.ndarray, "short short"]:
        """M^T M of M / `scale`, added up in float32 or float64; one pass. Its lower triangle, all that LAPACK reads."""
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

    def pieces(self, kind: np.dtype, entries: int = _PIECE) -> Iterator[Float[np.ndarray, "some short"]]:
        """M in pieces of rows, converted; each is overwritten by the next."""
        step = max(1, entries // self.short)
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
