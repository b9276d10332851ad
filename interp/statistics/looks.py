"""Looking at a growing sample more than once: alpha spent over the looks, so that all together err as one would.

Group-sequential tests (Lan & DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 1983) with a
spending function of O'Brien and Fleming's kind, alpha(t) = 2 - 2 Phi(z_{alpha/2} / sqrt(t)), t being the share of the
planned examples that were looked at: little early, nearly all at the end. How often and when one looks need not be
planned, only how far the sample grows at most. One-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from hooks.errors import FrankenlensError

_POINTS, _FAR = 401, 8.0
NEAREST = 1e-4
"""Looks whose shares lie nearer are refused: the density between them takes more points than can be had."""


def spent(share: float, alpha: float) -> float:
    """Alpha used up once this share of the planned examples has been looked at."""
    return float(2 * ndtr(ndtri(alpha / 2) / math.sqrt(share)))


def levels(shares: Sequence[float], alpha: float = 0.05) -> Float[np.ndarray, " look"]:
    """The one-sided level of each look, such that a true null is rejected at any of them with chance alpha at most.

    Args:
        shares: of the planned examples, at each look; rising, in (0, 1]. Alpha is used up at 1.
        alpha: of all looks together.

    Raises:
        FrankenlensError: shares that do not rise, lie outside (0, 1], or nearer to one another than `NEAREST`.

    Example:
        >>> [round(float(level), 4) for level in fl.statistics.levels([0.5, 1.0], 0.025)]
        [0.0015, 0.0245]
    """
    given = np.asarray(shares, dtype=float)
    if not len(given) or given[0] <= 0 or given[-1] > 1 or (np.diff(given) <= 0).any():
        raise FrankenlensError(
            f"the looks' shares are {', '.join(f'{share:g}' for share in given)}; they rise, from above 0 to 1"
        )
    steps = np.diff(given)
    if len(steps) and steps.min() < NEAREST * (1 - 1e-6):
        raise FrankenlensError(
            f"two looks lie {steps.min():.2g} of the planned examples apart; let the sample grow by {NEAREST:g} of "
            "them or more between looks"
        )
    found, before = [], _Walk(min(steps, default=1.0))
    used = 0.0
    for share in given:
        step = max(spent(float(share), alpha) - used, 0.0)
        used += step
        bound = before.bound(float(share), step)
        found.append(float(ndtr(-bound / math.sqrt(share))))
        before.go_on(float(share), bound)
    return np.array(found)


def over_looks(p: Float[np.ndarray, "*tests"], shares: Sequence[float]) -> Float[np.ndarray, "*tests"]:
    """One-sided p values of the last look, as p values of the whole sequence of looks.

    The smallest alpha at which the last look rejects when alpha is spent as `levels` does; NaN stays NaN. Reject where
    it is at most alpha, at any look: all looks together err with chance alpha at most. Corrections for several tests
    go on top.

    Args:
        p: of the last look.
        shares: of this look and all before it, as in `levels`.
    """
    if len(shares) == 1 and shares[0] == 1:
        return np.asarray(p, dtype=float)
    # as normal scores of two sides the one is nearly linear in the other; of a single look it is just that
    alphas, at = _levels_by_alpha(tuple(shares))
    given = np.asarray(p, dtype=float)
    with np.errstate(invalid="ignore"):
        found = 2 * ndtr(np.interp(ndtri(given / 2), ndtri(at / 2), ndtri(alphas / 2)))
    return np.where(np.isnan(given), np.nan, np.where(given > at.max(), 1.0, found))


@lru_cache(maxsize=32)
def _levels_by_alpha(
    shares: tuple[float, ...],
) -> tuple[Float[np.ndarray, " alphas"], Float[np.ndarray, " alphas"]]:
    """Alphas, and the level of the last look at each, in its order."""
    alphas = np.geomspace(1e-12, 0.999, 40)
    at = np.array([levels(shares, float(alpha))[-1] for alpha in alphas])
    order = np.argsort(at)
    return alphas[order], at[order]


class _Walk:
    """A standard Brownian motion that was not above the bounds of the looks before: its density at the last one.

    Args:
        step: the shortest time between two looks; the points stand half of its standard deviation apart at most.
    """

    def __init__(self, step: float) -> None:
        self._at, self._points = 0.0, max(_POINTS, 2 * math.ceil(2 * _FAR / math.sqrt(step)) + 1)
        self._places, self._mass = np.zeros(1), np.ones(1)

    def bound(self, at: float, chance: float) -> float:
        """What it lies above at `at`, not having been above before, with this chance."""
        width, far = math.sqrt(at - self._at), _FAR * math.sqrt(at)
        if chance <= 1e-15:
            return far
        low, high = -far, far
        for _ in range(60):
            middle = (low + high) / 2
            over = float(self._mass @ ndtr((self._places - middle) / width))
            low, high = (middle, high) if over > chance else (low, middle)
        return (low + high) / 2

    def go_on(self, at: float, bound: float) -> None:
        """To `at`, where it is not above the bound."""
        width, far = math.sqrt(at - self._at), _FAR * math.sqrt(at)
        places = np.linspace(-far, bound, self._points)
        weights = np.full(self._points, places[1] - places[0])
        weights[1:-1:2] *= 4 / 3
        weights[2:-1:2] *= 2 / 3
        weights[[0, -1]] /= 3
        density = np.exp(-(((places[:, None] - self._places) / width) ** 2) / 2) / (
            width * math.sqrt(2 * math.pi)
        )
        self._places, self._mass, self._at = places, (density @ self._mass) * weights, at
