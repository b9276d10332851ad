"""Looking at a growing sample more than once: alpha spent over the looks, so that all together err as one would.

Group-sequential tests (Lan & DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 1983) with a
spending function of O'Brien and Fleming's kind, alpha(t) = 2 - 2 Phi(z_{alpha/2} / sqrt(t)), t being the share of the
planned examples that were looked at: little early, nearly all at the end. How often and when one looks need not be
planned, only how far the sample grows at most. One-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from hooks.errors import FrankenlensError

_POINTS, _FAR = 401, 8.0


def spent(share: float, alpha: float) -> float:
    """Alpha used up once this share of the planned examples has been looked at."""
    return float(2 * ndtr(ndtri(alpha / 2) / math.sqrt(share)))


def levels(shares: Sequence[float], alpha: float = 0.05) -> Float[np.ndarray, " look"]:
    """The one-sided level of each look, such that a true null is rejected at any of them with chance alpha at most.

    Args:
        shares: of the planned examples, at each look; rising, in (0, 1]. Alpha is used up at 1.
        alpha: of all looks together.

    Raises:
        FrankenlensError: shares that do not rise, or lie outside (0, 1].

    Example:
        >>> [round(float(level), 4) for level in fl.statistics.levels([0.5, 1.0], 0.025)]
        [0.0015, 0.0245]
    """
    given = np.asarray(shares, dtype=float)
    if not len(given) or given[0] <= 0 or given[-1] > 1 or (np.diff(given) <= 0).any():
        raise FrankenlensError(
            f"the looks' shares are {', '.join(f'{share:g}' for share in given)}; they rise, from above 0 to 1"
        )
    found, before = [], _Walk()
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
    known = np.log(np.geomspace(1e-12, 0.999, 40))
    alphas = np.exp(known)
    at = np.array([levels(shares, float(alpha))[-1] for alpha in alphas])
    order = np.argsort(at)
    with np.errstate(divide="ignore"):
        found = np.exp(
            np.interp(np.log(np.maximum(p, 1e-300)), np.log(np.maximum(at[order], 1e-300)), known[order])
        )
    return np.where(np.isnan(p), np.nan, np.where(np.asarray(p) > at.max(), 1.0, found))


class _Walk:
    """A standard Brownian motion that was not above the bounds of the looks before: its density at the last one."""

    def __init__(self) -> None:
        self._at = 0.0
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
        places = np.linspace(-far, bound, _POINTS)
        weights = np.full(_POINTS, places[1] - places[0])
        weights[1:-1:2] *= 4 / 3
        weights[2:-1:2] *= 2 / 3
        weights[[0, -1]] /= 3
        density = np.exp(-(((places[:, None] - self._places) / width) ** 2) / 2) / (
            width * math.sqrt(2 * math.pi)
        )
        self._places, self._mass, self._at = places, (density @ self._mass) * weights, at
