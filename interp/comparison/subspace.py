"""How an update stands to the principal directions of the weights it changes (2511.08567)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.comparison.passes import Blocks, Passes
from interp.comparison.search import Search
from interp.comparison.singular_values import BROKEN, DOUBLE_SHARE, SVD_SHARE, is_small

ERROR = 1e-7
"""Of the largest angle between a subspace that was searched for and the true one, in radians."""
SMALLER = 256  # rows or columns up to which a whole decomposition is fast
ROUNDED = 0.1
"""Share of an update outside a subspace up to which it is computed in float64: float32 is wrong by some 1e-6."""
SQUARES = 1e-25, 1e35
"""Sums of squares between which a float32 sum of up to 1e9 of them loses none."""
Method = Literal["svd", "krylov", "gram"]


@dataclass(frozen=True)
class Subspace:
    """The leading singular vectors of a matrix, orthonormal columns: left (of its rows) and right (of its columns).

    Attributes:
        method: `svd` of the whole matrix in float64; `krylov`, steps of `interp.comparison.search.Search`, ended by
            their residuals; `gram`, all eigenvectors of the Gram matrix in float64, where the steps did not converge.
        error: bound, to first order, of the angle (radians) to the true subspace, where `method` is `krylov`; else 0.
    """

    left: Float[Tensor, "row k"]
    right: Float[Tensor, "column k"]
    method: Method = "svd"
    error: float = 0.0

    @property
    def k(self) -> int:
        """Dimensions."""
        return self.left.shape[1]


class Leading:
    """The leading singular vectors of a matrix, as exact as they are asked for.

    Args:
        blocks: the matrix.
        shape: rows and columns.
        k: fewer are found where the matrix has no more singular values that differ from 0.
        near: of a matrix that differs by an update, from whose vectors the search may then begin.
        change: at least the spectral norm of that update.

    Attributes:
        method, error: as in `Subspace`.

    Raises:
        FrankenlensError: an entry is infinite or NaN.
    """

    @torch.no_grad()
    def __init__(
        self,
        blocks: Blocks,
        shape: Sequence[int],
        k: int,
        near: Leading | None = None,
        change: float = math.inf,
    ) -> None:
        self._blocks, self._tall, self.error = blocks, shape[0] >= shape[1], 0.0
        self._passes, self._k = Passes(blocks, shape), min(k, *shape)
        self._far: Float[np.ndarray, "long k"] | None = None
        self._search: Search | None = None
        if is_small(shape) and min(shape) <= SMALLER:
            self.method: Method = "svd"
            self._by_svd()
            return
        self.method, self.error = "krylov", np.inf
        try:
            self._search = self._begun(near, change)
            self._search.narrow(DOUBLE_SHARE**2)
            self.until(ERROR)
        except np.linalg.LinAlgError:  # infinite or NaN, or so large that squares leave float32
            self._by_gram()

    @torch.no_grad()
    def until(self, error: float) -> bool:
        """Takes more steps until the error is as small as this; whether it is, or is as small as rounding lets it be.

        Where steps do not bring it to `ERROR`, the Gram matrix does.
        """
        if self._search is None or self.error <= error:
            return True
        self._far, converged = None, self._search.until(error)
        self._near, self.error, self._k = self._search.vectors, self._search.error, self._search.k
        if self.error > ERROR:
            self._by_gram()
            return True
        return converged

    def _begun(self, near: Leading | None, change: float) -> Search:
        """From the other's vectors where no new direction can matter, so small is the update; else from random ones."""
        other = None if near is None else near._search
        if other is not None and other.k == self._k and other.apart(other, 2 * change):
            found = Search(self._passes, self._k, near=other)
            if found.until(ERROR) and found.apart(other, change):
                return found
        return Search(self._passes, self._k)

    @property
    def k(self) -> int:
        """Dimensions."""
        return self._k

    @property
    def short_side(self) -> Float[Tensor, "short k"]:
        """The singular vectors of the shorter side, orthonormal columns."""
        return torch.from_numpy(self._near[:, : self._k].copy())

    @property
    def subspace(self) -> Subspace:
        """Both sides, in float64."""
        if self._far is None:
            near = np.ascontiguousarray(self._near[:, : self._k])
            far = self._passes.times(near) if self._search is None else self._search.far()
            self._far = np.linalg.qr(far)[0]
        far, near = torch.from_numpy(self._far[:, : self._k].copy()), self.short_side
        return Subspace(*((far, near) if self._tall else (near, far)), self.method, self.error)

    def _by_svd(self) -> None:
        whole = torch.cat([block.double() for block in self._blocks()])
        if not whole.isfinite().all():
            raise FrankenlensError(BROKEN)
        far, values, near = torch.linalg.svd(whole, full_matrices=False)
        self._k = min(self._k, int((values > SVD_SHARE * values[0]).sum()))
        self._far, self._near = far.numpy(), near.T.numpy()

    def _by_gram(self) -> None:
        short, gram = self._passes.short, self._passes.gram(np.float64)
        if not np.isfinite(np.diag(gram).sum()):
            raise FrankenlensError(BROKEN)
        wanted = [short - self._k, short - 1]
        values, vectors = scipy.linalg.eigh(
            gram, lower=True, subset_by_index=wanted, overwrite_a=True, check_finite=False
        )
        self._near, self._k = vectors[:, ::-1].copy(), int((values > DOUBLE_SHARE**2 * values[-1]).sum())
        self._search, self.error, self.method = None, 0.0, "gram"


def leading(blocks: Blocks, shape: Sequence[int], k: int, error: float = ERROR) -> Subspace:
    """The `k` leading singular vectors of a matrix, in float64.

    Args:
        blocks: the matrix, as in `interp.comparison.singular_values.blockwise`.
        shape: rows and columns.
        k: fewer are returned where the matrix has no more singular values that differ from 0.
        error: bound of the angle (radians) to the true subspace.

    Raises:
        FrankenlensError: an entry is infinite or NaN.
    """
    found = Leading(blocks, shape, k)
    found.until(error)
    return found.subspace


def principal_angles(a: Float[Tensor, "n k"], b: Float[Tensor, "n k"]) -> Float[np.ndarray, " k"]:
    """Between the spans of orthonormal columns, in radians, ascending.

    By sines where they are small and by cosines elsewhere (Björck & Golub 1973).

    Example:
        >>> plane = torch.eye(3)[:, :2]
        >>> turned = torch.tensor([[1.0, 0], [0, 0], [0, 1]])  # shares one direction with it
        >>> fl.principal_angles(plane, turned) / np.pi
        array([0. , 0.5], dtype=float32)
    """
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).flip(0)
    return torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()).numpy()


@torch.no_grad()
def energy_outside(blocks: Blocks, shape: Sequence[int], subspace: Subspace) -> float:
    """1 - |U^T D V|^2 / |D|^2 of an update D, in blocks as in `leading`; NaN without update.

    In float32; in float64 where little lies outside, so that rounding would show, or squares may leave float32.

    By chance, of an update without direction, it is 1 - k^2 / (rows * columns).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        inside, energy = _inside(blocks, shape, subspace, np.float32)
    if not SQUARES[0] < energy < SQUARES[1] or 1 - inside / energy < ROUNDED:
        inside, energy = _inside(blocks, shape, subspace, np.float64)
    return 1 - inside / energy if energy else np.nan


def _inside(
    blocks: Blocks, shape: Sequence[int], subspace: Subspace, kind: type[np.floating]
) -> tuple[float, float]:
    """|U^T D V|^2 and |D|^2."""
    tall = shape[0] >= shape[1]
    sides = (subspace.left, subspace.right) if tall else (subspace.right, subspace.left)
    far, near = (side.numpy().T.astype(kind) for side in sides)
    inside, energy, first = np.zeros((subspace.k, subspace.k)), 0.0, 0
    for piece in Passes(blocks, shape).pieces(np.dtype(kind)):
        inside += (near @ piece.T) @ far[:, first : first + len(piece)].T
        flat = piece.ravel(order="K")
        energy += float(flat @ flat)
        first += len(piece)
    return float((inside**2).sum()), energy
