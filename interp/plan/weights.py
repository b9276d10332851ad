"""What comparing checkpoints computes, reads and holds, from the shapes of their tensors alone.

Its numbers are LAPACK's and BLAS's, by the operation counts of Golub & Van Loan (Matrix Computations, 8.6): what a
library really does for a decomposition differs by a fifth. How many Krylov steps a matrix takes depends on how its
singular values fall; `SINGLE` and `DOUBLE` are those of weights whose values fall as the power 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hooks import HookedVLM
from hooks.stored.checkpoint import PART
from interp.comparison.held import HELD
from interp.comparison.search import GUARD
from interp.comparison.singular_values import is_small
from interp.comparison.subspace import SMALLER
from interp.comparison.table import AT_ONCE
from interp.comparison.workers import READERS
from interp.plan.work import Work

SINGLE, DOUBLE = 7, 3
"""Steps of a search for a subspace in float32, on k + 2 GUARD vectors, and in float64, on k."""
SUMS = 9
"""Operations on an entry and stage for norms, sparsity and cosine."""
MARGINS = 7
"""The same for heads, of tensors that single heads own parts of."""


@dataclass(frozen=True)
class _Matrix:
    """A tensor as the matrix that it is decomposed as."""

    long: int
    short: int
    item: int

    @property
    def entries(self) -> int:
        return self.long * self.short

    @property
    def held(self) -> int:
        """Bytes that are kept of one checkpoint's; a larger one is read anew for every pass."""
        return self.entries * self.item if self.entries * self.item <= HELD else 0

    @property
    def small(self) -> bool:
        return is_small((self.long, self.short))

    @property
    def whole(self) -> bool:
        """Whether its vectors come from a whole decomposition (`interp.comparison.subspace.Leading`)."""
        return self.small and self.short <= SMALLER


class ComparisonPlan:
    """A comparison of checkpoints of one architecture.

    Args:
        vlm: its structure.
        checkpoints: how many: 2, or 3 with Base.
        subspace: dimensions; 0: none.
    """

    def __init__(self, vlm: HookedVLM, checkpoints: int, subspace: int) -> None:
        self._n, self._stages, self._k = checkpoints, checkpoints - 1, subspace
        shapes = {name: (one.shape, one.element_size()) for name, one in vlm.model.named_parameters()}
        self._entries = sum(math.prod(shape) for shape, _ in shapes.values())
        self._bytes = sum(math.prod(shape) * item for shape, item in shapes.values())
        self._part = max((min(PART, math.prod(shape)) * item for shape, item in shapes.values()), default=1)
        self._matrices = [_of(shape, item) for shape, item in shapes.values() if len(shape) > 1]
        attention = [site.module for block in vlm.anatomy.text.blocks for site in block.sites]
        owned = {
            name: one for name, one in shapes.items() if any(name.startswith(f"{a}.") for a in attention)
        }
        self._by_head = sum(math.prod(shape) for shape, _ in owned.values())
        self._by_head_bytes = sum(math.prod(shape) * item for shape, item in owned.values())

    def norms(self) -> Work:
        """Norms, sparsity and cosines of all tensors, then of heads."""
        flops = self._stages * (SUMS * self._entries + MARGINS * self._by_head)
        buffers = READERS * self._n * self._part
        read = self._n * (self._bytes + self._by_head_bytes)
        return Work("norms, of heads too", 0, flops, {"parts of tensors": buffers}, read, scales=False)

    def spectra(self) -> Work:
        """All singular values of every update."""
        flops = self._stages * sum(map(_values, self._matrices))
        held = AT_ONCE["spectra"] * max(map(_spectrum_held, self._matrices), default=0)
        read = self._stages * 2 * sum(one.entries * one.item for one in self._matrices)
        return Work(
            "singular values of updates",
            0,
            flops,
            {"matrices and their Gram matrices": held},
            read,
            scales=False,
        )

    def subspaces(self) -> Work:
        """The leading singular vectors of every matrix of every checkpoint, and what of updates lies outside."""
        k, flops, read, held = self._k, 0, 0, 0
        for one in self._matrices:
            outside = 2 * one.entries * k + 2 * one.long * k * k + 2 * one.entries
            flops += self._n * (_vectors(one) if one.whole else _searched(one, k)) + self._stages * outside
            passes = 1 if one.held else 2 + SINGLE + DOUBLE
            read += (self._n * passes + (0 if one.held else 2 * self._stages)) * one.entries * one.item
            held = max(held, self._n * (one.held + _basis_held(one, k)) + _desk(one))
        what = "principal subspaces of weights"
        return Work(what, 0, flops, {"matrices and their subspaces": held}, read, scales=False)

    def hashes(self) -> Work:
        """All files once more."""
        parts = {"parts of tensors": self._n * self._part}
        return Work("hashes of the files", 0, 0, parts, self._n * self._bytes, scales=False)

    def works(self, spectra: bool) -> Iterator[Work]:
        """All of it."""
        yield self.norms()
        if spectra:
            yield self.spectra()
        if self._k:
            yield self.subspaces()
        yield self.hashes()


def _of(shape: Sequence[int], item: int) -> _Matrix:
    rows, columns = shape[0], math.prod(shape[1:])
    return _Matrix(max(rows, columns), min(rows, columns), item)


def values_alone(long: int, short: int) -> int | float:
    """Singular values of a matrix."""
    return 4 * long * short**2 - 4 / 3 * short**3


def thin_svd(long: int, short: int) -> int | float:
    """Singular values and vectors of both sides: by way of R, or at once, whichever is less."""
    return min(6 * long * short**2 + 20 * short**3, 14 * long * short**2 + 8 * short**3)


def eigenvalues_alone(n: int) -> int | float:
    """Of a symmetric matrix."""
    return 4 / 3 * n**3


def _values(one: _Matrix) -> int | float:
    if one.small:
        return values_alone(one.long, one.short)
    return one.long * one.short**2 + eigenvalues_alone(one.short)


def _vectors(one: _Matrix) -> int | float:
    return thin_svd(one.long, one.short)


def passes(long: int, short: int, k: int) -> int:
    """Products with a matrix and its transpose while its leading singular vectors are searched for."""
    return 4 * long * short * (SINGLE * min(short, k + 2 * GUARD) + DOUBLE * k)


def _searched(one: _Matrix, k: int) -> int | float:
    """Passes over the matrix, and what keeps the basis orthonormal."""
    width = min(one.short, k + 2 * GUARD)
    products = passes(one.long, one.short, k)
    return products + _orthonormal(one.short, [width] * SINGLE) + _orthonormal(one.short, [k] * DOUBLE)


def _orthonormal(short: int, blocks: Iterable[int]) -> int:
    """Twice against all that there is, products with it, Ritz vectors and residuals."""
    total, there = 0, 0
    for block in blocks:
        total += short * block * (14 * there + 16 * block)
        there += block
    return total


def _spectrum_held(one: _Matrix) -> int:
    if one.small:
        return 2 * one.held + 3 * 8 * one.entries
    return 2 * one.held + 2 * 4 * one.short**2 + _desk(one)


def _basis_held(one: _Matrix, k: int) -> int:
    if one.whole:
        return 8 * (2 * one.entries + one.short**2)
    width = k + 2 * GUARD
    return 8 * (2 * one.short * (width + DOUBLE * k) + one.long * k)


def _desk(one: _Matrix) -> int:
    """Pieces that are converted, and what they are made of."""
    return 3 * 8 * min(one.entries, PART)
