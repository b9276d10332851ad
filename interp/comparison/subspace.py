"""How an update stands to the principal directions of the weights it changes (2511.08567)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from interp.comparison.singular_values import DOUBLE_SHARE, SVD_SHARE, Blocks, gram, is_small


@dataclass(frozen=True)
class Subspace:
    """The leading singular vectors of a matrix, orthonormal columns: left (of its rows) and right (of its columns)."""

    left: Float[Tensor, "row k"]
    right: Float[Tensor, "column k"]

    @property
    def k(self) -> int:
        """Dimensions."""
        return self.left.shape[1]


@torch.no_grad()
def leading(blocks: Blocks, shape: Sequence[int], k: int) -> Subspace:
    """The `k` leading singular vectors of a matrix, in float64; of a large one by its float64 Gram matrix.

    Args:
        blocks: the matrix, as in `interp.comparison.singular_values.blockwise`.
        shape: rows and columns.
        k: fewer are returned where the matrix has no more singular values that differ from 0.
    """
    small = is_small(shape)
    far, near = _by_svd(blocks, k) if small else _by_gram(blocks, shape, k)
    return Subspace(far, near) if shape[0] >= shape[1] else Subspace(near, far)


def _by_svd(blocks: Blocks, k: int) -> tuple[Float[Tensor, "long k"], Float[Tensor, "short k"]]:
    whole = torch.cat([block.double() for block in blocks()])
    far, values, near = torch.linalg.svd(whole, full_matrices=False)
    k = min(k, int((values > SVD_SHARE * values[0]).sum()))
    return far[:, :k], near[:k].T


def _by_gram(
    blocks: Blocks, shape: Sequence[int], k: int
) -> tuple[Float[Tensor, "long k"], Float[Tensor, "short k"]]:
    short = min(shape)
    k = min(k, short)
    squares = (
        gram(blocks, shape, torch.float64).numpy().T
    )  # in Fortran's order, where the lower triangle is the upper
    wanted = [short - k, short - 1]
    values, vectors = scipy.linalg.eigh(
        squares, lower=False, subset_by_index=wanted, overwrite_a=True, check_finite=False
    )
    near = torch.from_numpy(vectors[:, ::-1].copy())[:, : int((values > DOUBLE_SHARE**2 * values[-1]).sum())]
    far = torch.cat([_product(block, near) for block in blocks()])
    return torch.linalg.qr(far)[0], near


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

    By chance, of an update without direction, it is 1 - k^2 / (rows * columns).
    """
    tall = shape[0] >= shape[1]
    far, near = (subspace.left, subspace.right) if tall else (subspace.right, subspace.left)
    inside, energy, first = torch.zeros(subspace.k, subspace.k, dtype=torch.float64), 0.0, 0
    for block in blocks():
        inside += far[first : first + len(block)].T @ _product(block, near)
        energy += float(block.norm(dtype=torch.float64)) ** 2
        first += len(block)
    return 1 - float(inside.square().sum()) / energy if energy else np.nan


def _product(
    matrix: Float[Tensor, "long short"], vectors: Float[Tensor, "short k"]
) -> Float[Tensor, "long k"]:
    """In float64, a piece of the matrix at a time."""
    step = max(1, (1 << 22) // matrix.shape[1])
    return torch.cat([piece.double() @ vectors for piece in matrix.split(step)])
