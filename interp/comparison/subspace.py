"""How an update stands to the principal directions of the weights it changes (2511.08567)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from interp.comparison.spectrum import Blocks, gram, is_small


@dataclass(frozen=True)
class Subspace:
    """The leading singular vectors of a matrix, orthonormal columns: left (of its rows) and right (of its columns)."""

    left: Float[Tensor, "row k"]
    right: Float[Tensor, "column k"]


@torch.no_grad()
def leading(blocks: Blocks, shape: Sequence[int], k: int) -> Subspace:
    """The `k` leading singular vectors of a matrix, in float64; of a large one by its float64 Gram matrix.

    Args:
        blocks: the matrix, in blocks as in `interp.comparison.spectrum.blockwise`.
        shape: rows and columns.
        k: at most the shorter side is taken.
    """
    short = min(shape)
    k = min(k, short)
    if is_small(shape):
        whole = torch.cat([block.double() for block in blocks()])
        left, _, right = torch.linalg.svd(whole, full_matrices=False)
        return Subspace(left[:, :k], right[:k].T)
    squares = gram(blocks, shape, torch.float64).numpy()
    vectors = scipy.linalg.eigh(squares, subset_by_index=[short - k, short - 1], overwrite_a=True)[1]
    near = torch.from_numpy(vectors[:, ::-1].copy())
    if shape[0] < shape[1]:
        far = torch.cat([_product(block.T, near) for block in blocks()])
        return Subspace(near, torch.linalg.qr(far)[0])
    far = torch.cat([_product(block, near) for block in blocks()])
    return Subspace(torch.linalg.qr(far)[0], near)


def principal_angles(a: Float[Tensor, "n k"], b: Float[Tensor, "n k"]) -> Float[np.ndarray, " k"]:
    """Between the spans of orthonormal columns, in radians, ascending.

    By sines where they are small and by cosines elsewhere (Björck & Golub 1973).
    """
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).flip(0)
    return torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()).numpy()


@torch.no_grad()
def energy_outside(blocks: Blocks, subspace: Subspace) -> float:
    """1 - |U^T D V|^2 / |D|^2 of an update D in blocks of rows; NaN without update."""
    k = subspace.right.shape[1]
    inside, energy, first = torch.zeros(k, k, dtype=torch.float64), 0.0, 0
    for block in blocks():
        rows = subspace.left[first : first + len(block)]
        inside += rows.T @ _product(block, subspace.right)
        energy += float(block.norm(dtype=torch.float64)) ** 2
        first += len(block)
    return 1 - float(inside.square().sum()) / energy if energy else np.nan


def _product(
    matrix: Float[Tensor, "row column"], vectors: Float[Tensor, "column k"]
) -> Float[Tensor, "row k"]:
    """In float64, a piece of the matrix at a time."""
    step = max(1, (1 << 22) // matrix.shape[1])
    return torch.cat([piece.double() @ vectors for piece in matrix.split(step)])
