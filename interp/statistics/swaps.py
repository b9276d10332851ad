"""Is what was done larger than what chance in its place does? A test that holds for any number of examples.

If the direction of a change meant nothing, it and random ones of the same size could change places on any example, or
on all examples of a cluster, and nothing would tell. The test draws such exchanges, and p is the share that sets the
two as far apart as they are. Its size is at most p whatever the values look like (Fisher, The Design of Experiments,
1935; Phipson & Smyth, Stat. Appl. Genet. Mol. Biol. 2010, for the 1 that is added).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Real

from interp.statistics.means import Clusters

_CHUNK = 4_000_000  # floats of one [swap cells] block


def swap_test(
    done: Real[np.ndarray, "*cells example"],
    random: Real[np.ndarray, "draw *cells example"],
    *,
    clusters: Clusters | None = None,
    swaps: int = 999,
    seed: int = 0,
) -> Float[np.ndarray, "*cells"]:
    """One-sided p of |mean of what was done| against the average |mean| of the random draws.

    Args:
        done: one value per cell and example; NaN where the example has none.
        random: draws of chance on the same examples; NaN leaves the example out as well.
        clusters: examples that change places together; None: each on its own.
        swaps: exchanges that are drawn, the same for all cells.
        seed: of them.

    Returns:
        p, at least 1 / (swaps + 1); NaN where a cell has no example, or one whose value is infinite: exchanges of it
        cannot be compared.

    Example:
        >>> done, random = np.full(12, 2.0), np.tile([0.5, -0.5], 6)[None]
        >>> float(fl.statistics.swap_test(done, random))
        0.002
    """
    given = np.concatenate([np.asarray(done, dtype=np.float64)[None], np.asarray(random, dtype=np.float64)])
    lanes, shape, n_examples = len(given), given.shape[1:-1], given.shape[-1]
    given = given.reshape(lanes, math.prod(shape), n_examples)
    infinite = np.asarray(np.isinf(given).any((0, -1)))[:, None]
    there = ~np.isnan(given).any(0) & ~infinite
    given = np.where(there, given, 0.0)
    unit = (
        np.arange(n_examples) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    )
    unit = np.ravel(unit)
    turns = np.random.default_rng(seed).integers(lanes, size=(swaps, int(unit.max(initial=-1)) + 1))[:, unit]
    taken = [(turns == turn).astype(np.float64) for turn in range(lanes)]
    p = np.full(given.shape[1], np.nan)
    for cells in np.array_split(np.arange(len(p)), max(1, -(-len(p) * swaps * lanes // _CHUNK))):
        own = given[:, cells]
        apart = _apart([own[lane].sum(-1) for lane in range(lanes)])
        moved = [
            sum(taken[turn] @ own[(lane + turn) % lanes].T for turn in range(lanes)) for lane in range(lanes)
        ]
        slack = 1e-12 * np.abs(own).sum((0, -1))
        p[cells] = (1 + (_apart(moved) >= apart - slack).sum(0)) / (swaps + 1)
    return np.where(there.any(-1), p, np.nan).reshape(shape)


def _apart(sums: list) -> Float[np.ndarray, "*swaps cells"]:
    return np.abs(sums[0]) - np.mean([np.abs(one) for one in sums[1:]], axis=0)
