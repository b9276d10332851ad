"""Leading singular vectors by block Krylov steps, in float32 as far as it carries, then in float64; and their error."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from interp.comparison.passes import Passes

GUARD = 8
"""Vectors beyond those wanted that are carried along: what is wanted is told from what follows by them."""
FLOOR = 1e-6  # of an eigenvalue: float32 brings residuals little below this
_MOST = 640  # vectors of a basis
_STEPS = 60  # in float64, at most
_SWEEPS = 12  # passes in float32, at most, for each in float64
NEAR = 1e-2
"""Error of another matrix's vectors from which on float64 steps take them as they are."""
_ROUGH = 1e-4  # error from which on float64 steps, with those, are cheaper
_KEPT = 128 << 20  # bytes of M times the basis, at most
_BEYOND = 0.3  # of the error that is wanted: what float32 aims at, so that one step does
_Values = Float[np.ndarray, " _m"]
_Vectors = Float[np.ndarray, "short _m"]


class Search:
    """The k leading right singular vectors of a matrix M, as eigenvectors of M^T M that is never formed at first.

    Block Krylov steps with full orthogonalization (Golub & Underwood 1977) from a random block, by Rayleigh and Ritz:
    one pass over M a step. In float32, until they are near; then from the vectors found, in float64, where each step is
    preconditioned by steps in float32 (Davidson 1975), so that one or two do. Where float32 steps promise to take
    longer than forming the Gram matrix, it is formed, in float32, and they are taken on it.

    Args:
        passes: M.
        k: how many.
        seed: of the random block.
        near: the search in a matrix nearby, whose vectors stand for a part of the block. They save most of the steps,
            and could hide a direction that is new and orthogonal to them all: see `apart`.

    Attributes:
        values: eigenvalues of M^T M: of those wanted and of what was carried along, descending.
        vectors: theirs, orthonormal, in float64.
        error: bound, to first order, of the sine of the largest angle between the span of the first k and the true
            one, by residuals and gaps.
        n_passes: over M.

    Raises:
        np.linalg.LinAlgError: a product is infinite or NaN: M has such entries, or its squares leave float32.
    """

    def __init__(self, passes: Passes, k: int, seed: int = 0, near: Search | None = None) -> None:
        self.k, self.passes, self.n_passes = k, passes, 0
        self._width = min(passes.short, k + 2 * GUARD)
        self._gram: Float[np.ndarray, "short short"] | None = None
        if near is not None:
            self._rough, self._width = near._rough, near.vectors.shape[1]
            self._begin(near.vectors)
            if self.error <= NEAR:
                return
        block = np.random.default_rng(seed).standard_normal((passes.short, self._width))
        if near is not None:
            block[:, : near.vectors.shape[1]] = near.vectors
        rough = self._in_single(block.astype(np.float32))
        self._rough = rough if near is None else near._rough
        self._width = min(passes.short, k + GUARD)
        self._begin(self.vectors[:, : self._width].astype(np.float64))

    def until(self, error: float) -> bool:
        """Goes on in float64 until the error is bounded by this; whether it is."""
        errors = [math.inf]
        for _ in range(_STEPS):
            errors.append(self.error)
            if self.error <= error:
                return True
            if self._gram is not None and len(errors) > 6 and self.error > 0.1 * errors[-6]:
                return False
            self._weigh(errors, error, 14 * self.k)
            if self._basis.width + self.k > _MOST:
                self._begin(self.vectors)
            residuals = self._basis.residuals(self.k)
            self._basis.widen(self._corrected(residuals, _BEYOND * error / self.error))
            self._see(self._basis)
        return False

    def apart(self, other: Search, change: float) -> bool:
        """Whether nothing can be missing here that another matrix lacks, whose leading values the other search has.

        The matrices differ by at most `change` in spectral norm. An eigenvector missing from the first j, whose value
        were as large as θ_j, would make j + 1 singular values of this matrix that large, hence (Weyl 1912) the j + 1st
        of the other no smaller than that less the change. So none is missing where some θ_j >= θ_k says otherwise.
        """
        mine = np.sqrt(np.maximum(self.values, 0))
        theirs = np.sqrt(np.maximum(other.values, 0) + other._residuals)
        n = min(len(mine), len(theirs))
        return bool((mine[self.k - 1 : n - 1] - theirs[self.k : n] > change).any())

    def narrow(self, share: float) -> None:
        """Fewer are wanted, where not so many eigenvalues are above a share of the largest."""
        self.k = int((self.values[: self.k] > share * self.values[0]).sum())
        self._see(self._basis)

    def _in_single(self, block: _Vectors) -> _Basis:
        """Float32 steps, to where float32 ends."""
        basis, errors = _Basis(block, self._apply), [math.inf]
        while basis.width + self._width <= min(_MOST, self.passes.short):
            self._see(basis)
            errors.append(self.error)
            if self.error <= _ROUGH or self._floored(basis):
                return basis
            self._weigh(errors, 1e-5, 5 * self._width)
            basis.widen(basis.residuals(self._width))
        self._see(basis)
        return basis

    def _corrected(self, residuals: _Vectors, share: float) -> _Vectors:
        """(G - θ)^-1 of each residual beside the vectors found, in float32, until a share of the residual is left.

        In a space that is spanned, step by step, by what the rough inverse makes of what is left.
        """
        held, shifts = self.vectors.astype(np.float32), self.values[: self.k]
        some = (residuals / _sizes(residuals)).astype(np.float32)
        left = some = some - held @ (held.T @ some)
        basis, worst, found = _Basis(held[:, :0], self._apply, held), [1.0], np.zeros_like(some)
        while worst[-1] > share and len(worst) <= _SWEEPS:
            basis.widen(self._roughly(left))
            values, rotated = np.linalg.eigh(basis.products)
            inside = rotated.T @ (basis.of.T @ some)
            weights = (rotated @ (inside / (values[:, None] - shifts))).astype(np.float32)
            found = basis.of @ weights
            left = some - basis.images @ weights + found * shifts.astype(np.float32)
            left -= held @ (held.T @ left)
            worst.append(float(np.linalg.norm(left, axis=0).max()))
            if len(worst) > 3 and worst[-1] > 0.5 * worst[-3]:
                break  # rounding
        return (found + self._roughly(left)).astype(np.float64)

    def _roughly(self, residuals: _Vectors) -> _Vectors:
        """As if G were, beside the span of the float32 steps, a number."""
        of, (values, rotated) = self._rough.of, self._rough.solved
        shifts, most = (
            self.values[: self.k],
            -FLOOR * self.values[0],
        )  # no division by zero, whatever is rough
        values, turned = values[self._width :], rotated[:, self._width :].astype(np.float32)
        inside = of.T @ residuals
        rest = float(values.mean()) if len(values) else 0.0
        beside = (residuals - of @ inside) / np.minimum(rest - shifts, most).astype(np.float32)
        weights = (1 / np.minimum(values[:, None] - shifts, most)).astype(np.float32)
        return beside + of @ (turned @ (weights * (turned.T @ inside)))

    def _weigh(self, errors: list[float], target: float, columns: int) -> None:
        """Forms the Gram matrix where it would cost less than the steps that are left: each as much as some columns."""
        if self._gram is not None or len(errors) < 5 or columns * _left(errors, target) < self.passes.short:
            return
        self._gram = self.passes.gram(np.float32)
        self._gram += np.tril(self._gram, -1).T
        self.n_passes += 1

    def _floored(self, basis: _Basis) -> bool:
        sizes = np.linalg.norm(basis.residuals(self.k), axis=0)
        return bool((sizes <= FLOOR * np.maximum(self.values[: self.k], 0.1 * self.values[0])).all())

    def _begin(self, vectors: _Vectors) -> None:
        """In float64, from these."""
        self._across: list[_Vectors] | None = []
        self._basis = _Basis(vectors, self._apply)
        self._see(self._basis)

    def far(self) -> Float[np.ndarray, "long k"]:
        """M times the first k vectors, in float64; no pass over M where products with the basis were kept."""
        if self._across is None:
            return self.passes.times(np.ascontiguousarray(self.vectors[:, : self.k]))
        return np.concatenate(self._across, 1) @ self._basis.solved[1][:, : self.k]

    def _apply(self, block: _Vectors) -> _Vectors:
        if block.dtype == np.float32 and self._gram is not None:
            return self._gram @ block
        self.n_passes += 1
        if block.dtype == np.float32:
            return self.passes.gram_times(block)
        across, images = self.passes.both_times(block)
        if self._across is not None:
            self._across.append(across)
            if sum(one.nbytes for one in self._across) > _KEPT:
                self._across = None
        return images

    def _see(self, basis: _Basis) -> None:
        self.values, self.vectors = basis.values[: self._width], basis.vectors(self._width)
        self._residuals = np.linalg.norm(basis.residuals(self._width), axis=0)
        self.error = _bound(self.values, self._residuals, self.k)


class _Basis:
    """Orthonormal vectors, what M^T M makes of them, and its eigenvalues in their span.

    Attributes:
        of, images: the vectors, and M^T M of them.
        products: V^T M^T M V.
    """

    def __init__(
        self, block: _Vectors, apply: Callable[[_Vectors], _Vectors], beside: _Vectors | None = None
    ) -> None:
        self._apply, self._beside = apply, beside
        self.of = block[:, :0]
        self.images, self.products = self.of, np.zeros((0, 0))
        self._solution: tuple[_Values, Float[np.ndarray, "_m _m"]] | None = None
        if block.shape[1]:
            self.widen(block)

    @property
    def width(self) -> int:
        """How many vectors."""
        return self.of.shape[1]

    def widen(self, block: _Vectors) -> None:
        """By what of a block is orthogonal to what there is."""
        held = self.of if self._beside is None else np.concatenate([self._beside, self.of], 1)
        new = _orthonormal(block, held)
        images = self._apply(new)
        if not np.isfinite(images).all():
            raise np.linalg.LinAlgError("a product is infinite or NaN")
        across = (self.of.T @ images).astype(np.float64)
        own = (new.T @ images).astype(np.float64)
        self.products = np.block([[self.products, across], [across.T, (own + own.T) / 2]])
        self.of, self.images = np.concatenate([self.of, new], 1), np.concatenate([self.images, images], 1)
        self._solution = None

    @property
    def values(self) -> _Values:
        """Ritz values, descending."""
        return self.solved[0]

    @property
    def solved(self) -> tuple[_Values, Float[np.ndarray, "_m _m"]]:
        if self._solution is None:
            values, rotated = np.linalg.eigh(self.products)
            self._solution = values[::-1], rotated[:, ::-1]
        return self._solution

    def vectors(self, n: int) -> _Vectors:
        """The n leading Ritz vectors."""
        return self.of @ self.solved[1][:, :n].astype(self.of.dtype)

    def residuals(self, n: int) -> _Vectors:
        """M^T M x - θ x of each."""
        some = self.solved[1][:, :n].astype(self.of.dtype)
        return self.images @ some - (self.of @ some) * self.values[:n].astype(self.of.dtype)


def _orthonormal(block: _Vectors, held: _Vectors | None = None) -> _Vectors:
    """The span of a block, orthogonal to what is held; twice, which is enough."""
    for _ in range(2):
        if held is not None:
            block = block - held @ (held.T @ block)
        block = np.linalg.qr(block)[0]
    return block


def _sizes(vectors: _Vectors) -> _Values:
    """Norms; 1 for zero."""
    sizes = np.linalg.norm(vectors, axis=0)
    return np.where(sizes > 0, sizes, 1)


def _left(errors: list[float], target: float) -> float:
    """Steps that are left, if errors go on falling as in the last three."""
    rate = math.log(errors[-4] / errors[-1]) / 3 if errors[-1] < errors[-4] < math.inf else 0.0
    return math.log(max(1.0, errors[-1] / target)) / rate if rate > 0 else math.inf


def _bound(values: _Values, residuals: _Values, k: int) -> float:
    """Of the sine of the largest angle between k Ritz vectors' span and that of the k leading eigenvectors.

    Residuals are orthogonal to all Ritz vectors, so that the first j > k as a whole can only err towards eigenvectors
    behind them: by residual / gap, the gap being that to θ_j. By as much the vectors k+1..j err too, and what goes by
    them into the first k is smaller by their residual / the gap at k. The best j counts.
    """
    if not k or not values[0]:
        return 0.0
    following = np.append(values, 0.0)
    found, cut = math.inf, values[k - 1] - following[k]
    for j in range(k, len(values) + 1):
        rest = float(np.linalg.norm(residuals[k:j]))
        gaps = values[:k] - following[max(k, j - 1)] - 2 * rest
        if cut > 0 and gaps[-1] > 0:
            found = min(found, (1 + rest / cut) * float(np.linalg.norm(residuals[:k] / gaps)))
    return found
