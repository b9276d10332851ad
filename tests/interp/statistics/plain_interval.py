"""Interval and p of one mean, or of one ratio of sums, from the formulas: Hall's transform with scipy's own skewness.

Nothing of `interp.statistics` but its two numbers (how often skewness enters, and what counts where Hall's says more);
the ends are found by scipy. What tables of many cells say is held against it, cell by cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize, stats

from interp.statistics.means import MORE, SKEW


def plain_interval(
    top: np.ndarray, bottom: np.ndarray | None = None, clusters: Any = None
) -> tuple[float, float, float]:
    """sum(top) / sum(bottom), or the mean of top, and the ends of its 95 % interval."""
    x, y = _units(top, bottom, clusters)
    value, quantile = float(x.sum() / y.sum()), stats.t.isf(0.025, len(x) - 1)
    spread = np.std(x - value * y, ddof=1) / np.sqrt(len(x)) / abs(y.mean())
    turned = np.sign(y.mean())

    def above(r: float) -> float:
        return float(_said(turned * (x - r * y))[0] - quantile)

    def below(r: float) -> float:
        return float(_said(turned * (x - r * y))[1] + quantile)

    return value, _root(above, value, -spread), _root(below, value, spread)


def plain_p(values: np.ndarray, clusters: Any = None) -> float:
    """Two-sided, of a mean of 0."""
    x, _ = _units(values, None, clusters)
    above, below = _said(x)
    return float(min(1.0, 2 * min(stats.t.sf(above, len(x) - 1), stats.t.cdf(below, len(x) - 1))))


def _units(top: np.ndarray, bottom: np.ndarray | None, clusters: Any) -> tuple[np.ndarray, np.ndarray]:
    y = np.ones(len(top)) if bottom is None else bottom
    own = np.arange(len(top)) if clusters is None else np.asarray(clusters)
    there = ~(np.isnan(top) | np.isnan(y))
    each = [there & (own == one) for one in np.unique(own[there])]
    return np.array([top[some].sum() for some in each]), np.array([y[some].sum() for some in each])


def _said(d: np.ndarray) -> tuple[float, float]:
    """What speaks for a mean above 0, and (negative) for one below."""
    n = len(d)
    student, k = d.mean() / stats.sem(d), SKEW * stats.skew(d, bias=False)
    small = student / np.sqrt(n)
    step = np.sqrt(n) * (small + k * small**2 / 3 + k**2 * small**3 / 27 + k / (6 * n)) - student
    return student + min(step, MORE * step), student + max(step, MORE * step)


def _root(function: Callable[[float], float], value: float, step: float) -> float:
    """The first root on one side of the value."""
    far = value + step
    while function(far) * function(value) > 0:
        far += step / 4
    found: Any = optimize.brentq(function, value, far, xtol=1e-14)
    return float(found)
