"""The columns of a comparison that are about principal subspaces: how they turn, and what of an update lies outside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from hooks.stored.checkpoint import Checkpoint
from interp.comparison.held import difference, held
from interp.comparison.subspace import Leading, energy_outside, principal_angles

SHARE = 5e-5
"""Of the mean angle between two subspaces: what the error of each may come to."""
_FINEST = 1e-12  # error of a subspace below which float64 has nothing to say


def directions(
    checkpoints: Sequence[Checkpoint], k: int, work: tuple[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Of one tensor in every stage; each checkpoint's singular vectors are found once.

    Args:
        checkpoints: (IN, RL) or (Base, IN, RL).
        k: dimensions.
        work: the tensor, and of each stage's update of it at least its spectral norm, 0 where there is none.

    Returns:
        A row per stage; empty ones for a vector.
    """
    name, changes = work
    shape = checkpoints[0].tensors[name].matrix
    if shape is None:
        return [{} for _ in changes]
    matrices = [held(one, name) for one in checkpoints]
    found = [Leading(matrices[0], shape, k)]
    for matrix, change in zip(matrices[1:], changes, strict=True):
        found.append(Leading(matrix, shape, k, found[-1], change) if change else found[-1])
    rows = []
    for (before, old), (after, new) in pairwise(zip(matrices, found, strict=True)):
        angles = _angles(old, new)
        one = old.subspace
        row: dict[str, Any] = {"subspace_k": one.k, "subspace_method": _method(old, new)}
        row["subspace_error"] = old.error + new.error
        row["energy_outside"] = energy_outside(difference(before, after, shape), shape, one)
        row["energy_outside_chance"] = 1 - one.k**2 / (shape[0] * shape[1])
        rows.append(row | angles)
    return rows


def _angles(old: Leading, new: Leading) -> dict[str, Any]:
    """Of both sides, exact enough that errors do not show in them."""
    if old.k == new.k > 0:  # the shorter side costs no pass over the matrices
        _refined(old, new, [principal_angles(old.short_side, new.short_side)])
    sides, again = {}, True
    while again:
        one, other = old.subspace, new.subspace
        if not one.k == other.k > 0:
            return {}
        pairs = {"left": (one.left, other.left), "right": (one.right, other.right)}
        sides = {side: principal_angles(*pair) for side, pair in pairs.items()}
        again = _refined(old, new, list(sides.values()))
    row: dict[str, Any] = {}
    for side, angles in sides.items():
        row |= {f"principal_angle_max_{side}": angles[-1], f"principal_angle_mean_{side}": angles.mean()}
    return row


def _refined(old: Leading, new: Leading, sides: Sequence[Float[np.ndarray, " k"]]) -> bool:
    """Takes what steps the angles ask for; whether there were any, and they brought what was asked."""
    allowed = max(_FINEST, SHARE * min(angles.mean() for angles in sides))
    if old is new or max(old.error, new.error) <= allowed:
        return False
    reached = [each.until(allowed) for each in (old, new)]
    return all(reached)


def _method(*found: Leading) -> str:
    return " and ".join(dict.fromkeys(one.method for one in found))
