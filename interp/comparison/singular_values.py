"""Singular values of an update, and the numbers made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.comparison.passes import Blocks, Passes

TOP = 50
SMALL = 512  # up to this many rows or columns, singular values come from a float64 SVD
SVD_SHARE, SINGLE_SHARE, DOUBLE_SHARE = 1e-11, 0.03, 1e-6
"""Singular values below this share of the largest are not trusted: relative errors there can exceed 1e-4 (1e-5 for the
SVD), measured for a float64 SVD and for Gram matrices in float32 and in float64."""
BROKEN = "a matrix has entries that are infinite or NaN; save the checkpoint again, whole."
NUCLEAR = 1e-4  # relative error of the sum of all singular values that is let pass


@dataclass(frozen=True)
class Spectrum:
    """Singular values, descending.

    Attributes:
        values: all of them.
        trusted: where the relative error is below 1e-4. The others are right to 1e-3 of the largest at worst, and
            all together (the nuclear norm) to 1e-4.
        method: `svd` of the matrix in float64, or the eigenvalues of its Gram matrix (`gram float32`, `gram float64`);
            `none` of a zero matrix, `tridiagonal` of a random draw.
    """

    values: Float[np.ndarray, " rank"]
    trusted: Bool[np.ndarray, " rank"]
    method: str = "svd"

    @property
    def stable_rank(self) -> float:
        """Sum of squares / largest squared; NaN for a zero matrix."""
        return float((self.values**2).sum() / self.values[0] ** 2) if self.values[0] else np.nan

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of values / sum of values (Roy & Vetterli 2007); NaN for a zero matrix."""
        if not self.values[0]:
            return np.nan
        p = self.values / self.values.sum()
        p = p[p > 0]
        return float(np.exp(-(p * np.log(p)).sum()))

    @property
    def condition_number(self) -> float:
        """Largest / smallest; NaN where the smallest is not trusted or 0."""
        return float(self.values[0] / self.values[-1]) if self.trusted[-1] and self.values[-1] else np.nan

    def log_volume(self, top: int = TOP) -> float:
        """Sum of the natural logarithms of the `top` largest; NaN where one of them is not trusted or 0."""
        some = self.values[:top]
        return float(np.log(some).sum()) if self.trusted[:top].all() and some.all() else np.nan

    def log_ratios(self, top: int = TOP) -> Float[np.ndarray, " top"]:
        """log(value / largest) of the `top` largest; NaN where not trusted or 0."""
        some = np.where(self.trusted & (self.values > 0), self.values, np.nan)[:top]
        return np.log(some / self.values[0]) if self.values[0] else some


def spectrum(delta: Float[Tensor, "row column"], top: int = TOP) -> Spectrum:
    """All singular values of a matrix.

    A small matrix: by a float64 SVD. A larger one: from the eigenvalues of its Gram matrix in float32, faster than an
    SVD; where that is not exact enough, from a Gram matrix in float64: if one of the `top` largest is not trusted, or
    the many small ones (of a low-rank update, say) could together move the nuclear norm by more than 1e-4.

    Example:
        >>> found = fl.comparison.spectrum(torch.diag(torch.tensor([3.0, 4.0])))
        >>> found.values, found.stable_rank
        (array([4., 3.]), 1.5625)
    """
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    return blockwise(lambda: iter((tall,)), delta.shape, float(delta.abs().max()), top)


@torch.no_grad()
def blockwise(blocks: Blocks, shape: Sequence[int], largest: float, top: int = TOP) -> Spectrum:
    """`spectrum` of a matrix that comes in blocks, so that it need not fit in memory.

    Args:
        blocks: called once per pass over the matrix.
        shape: rows and columns.
        largest: size of the largest entry; by it all is divided, lest squares leave float32's range.
        top: how many values must be trusted if float32 is to do.

    Raises:
        FrankenlensError: an entry is infinite or NaN.
    """
    if not np.isfinite(largest):
        raise FrankenlensError(BROKEN)
    if not largest:
        return Spectrum(np.zeros(min(shape)), np.ones(min(shape), dtype=bool), "none")
    if is_small(shape):
        matrix = torch.cat([block.double() for block in blocks()]) / largest
        values = torch.linalg.svdvals(matrix).numpy() * largest
        return Spectrum(values, values >= SVD_SHARE * values[0])
    found = _by_gram(blocks, shape, largest, np.float32, SINGLE_SHARE)
    if found.trusted[:top].all() and _nuclear_error(found, SINGLE_SHARE) <= NUCLEAR:
        return found
    return _by_gram(blocks, shape, largest, np.float64, DOUBLE_SHARE)


def _nuclear_error(found: Spectrum, share: float) -> float:
    """Bound of the nuclear norm's relative error, when eigenvalues err by as much as makes 1e-4 of σ at `share`."""
    noise, ratios = 2e-4 * share**2, found.values / found.values[0]
    with np.errstate(divide="ignore"):
        errors = np.minimum(noise**0.5, noise / (2 * ratios))
    return float(errors.sum() / ratios.sum())


def is_small(shape: Sequence[int]) -> bool:
    """Whether a matrix is decomposed as it is, in float64, rather than by its Gram matrix."""
    return min(shape) <= SMALL and shape[0] * shape[1] <= 1 << 24


def _by_gram(
    blocks: Blocks, shape: Sequence[int], largest: float, kind: type[np.floating], share: float
) -> Spectrum:
    gram = torch.from_numpy(
        Passes(blocks, shape).gram(kind, largest).T
    )  # its lower triangle is now the upper
    squares = torch.linalg.eigvalsh(gram, UPLO="U")
    values = squares.clamp(min=0).sqrt().flip(0).double().numpy() * largest
    return Spectrum(values, values >= share * values[0], f"gram {np.dtype(kind)}")
