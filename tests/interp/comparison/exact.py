"""Spectra and subspaces by whole decompositions, as they were computed before: what faster ways are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from interp.comparison.passes import Blocks
from interp.comparison.singular_values import (
    DOUBLE_SHARE,
    NUCLEAR,
    SINGLE_SHARE,
    TOP,
    Spectrum,
    _nuclear_error,
)
from interp.comparison.subspace import Subspace, principal_angles

_TILES = 8
_COPIED = 1 << 22


def gram(blocks: Blocks, short: int, dtype: torch.dtype) -> Float[Tensor, "short short"]:
    """M^T M, its lower triangle by tiles."""
    found = torch.zeros(short, short, dtype=dtype)
    edges = torch.linspace(0, short, _TILES + 1).long().tolist()
    for block in blocks():
        for piece in block.T.split(max(1, _COPIED // short), dim=1):
            part = piece.to(dtype)
            for i in range(_TILES):
                for j in range(i + 1):
                    rows, columns = slice(edges[i], edges[i + 1]), slice(edges[j], edges[j + 1])
                    found[rows, columns].addmm_(part[rows], part[columns].T)
    return found


def spectrum(blocks: Blocks, shape: Sequence[int], top: int = TOP) -> Spectrum:
    """By a Gram matrix in float32, and by one in float64 where that is not exact enough."""
    found = _spectrum(blocks, min(shape), torch.float32, SINGLE_SHARE)
    if found.trusted[:top].all() and _nuclear_error(found, SINGLE_SHARE) <= NUCLEAR:
        return found
    return in_double(blocks, shape)


def in_double(blocks: Blocks, shape: Sequence[int]) -> Spectrum:
    """By a Gram matrix in float64."""
    return _spectrum(blocks, min(shape), torch.float64, DOUBLE_SHARE)


def _spectrum(blocks: Blocks, short: int, dtype: torch.dtype, share: float) -> Spectrum:
    squares = torch.linalg.eigvalsh(gram(blocks, short, dtype))
    values = squares.clamp(min=0).sqrt().flip(0).double().numpy()
    return Spectrum(values, values >= share * values[0])


def leading(blocks: Blocks, shape: Sequence[int], k: int) -> Subspace:
    """By all eigenvectors of the Gram matrix in float64."""
    short = min(shape)
    squares = gram(blocks, short, torch.float64).numpy().T
    wanted = [short - k, short - 1]
    _, vectors = scipy.linalg.eigh(
        squares, lower=False, subset_by_index=wanted, overwrite_a=True, check_finite=False
    )
    near = torch.from_numpy(vectors[:, ::-1].copy())
    far = torch.linalg.qr(torch.cat([product(block, near) for block in blocks()]))[0]
    return Subspace(far, near) if shape[0] >= shape[1] else Subspace(near, far)


def angles(before: Blocks, after: Blocks, shape: Sequence[int], k: int) -> dict[str, float]:
    """The columns of principal angles."""
    one, other = (leading(blocks, shape, k) for blocks in (before, after))
    found = {}
    for side in ("left", "right"):
        some = principal_angles(getattr(one, side), getattr(other, side))
        found |= {f"principal_angle_max_{side}": some[-1], f"principal_angle_mean_{side}": some.mean()}
    return found | {"energy_outside": outside(before, after, shape, one)}


def outside(before: Blocks, after: Blocks, shape: Sequence[int], subspace: Subspace) -> float:
    """1 - |U^T D V|^2 / |D|^2."""
    tall = shape[0] >= shape[1]
    far, near = (subspace.left, subspace.right) if tall else (subspace.right, subspace.left)
    inside, energy, first = torch.zeros(subspace.k, subspace.k, dtype=torch.float64), 0.0, 0
    for one, two in zip(before(), after(), strict=True):
        delta = two.double() - one.double()
        inside += far[first : first + len(delta)].T @ (delta @ near)
        energy += float(delta.norm()) ** 2
        first += len(delta)
    return 1 - float(inside.square().sum()) / energy if energy else np.nan


def product(
    matrix: Float[Tensor, "long short"], vectors: Float[Tensor, "short k"]
) -> Float[Tensor, "long k"]:
    """In float64, a piece of the matrix at a time."""
    step = max(1, _COPIED // matrix.shape[1])
    return torch.cat([piece.double() @ vectors for piece in matrix.split(step)])
