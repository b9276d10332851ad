"""Intervals and tests of means, paired differences and ratios of sums: for skewed data, and examples in clusters.

The interval is what the test of `interp.statistics.moments` does not reject; no bootstrap. Chosen by simulation of
fourteen shapes of data (Gamma, Weibull, lognormal, uniform, Laplace, t, sparse ones of five kinds, right or wrong) at
n = 20 to 200, and held to nine others in `tests/planted/test_calibration.py` (`make calibration`).

    nominal 95 %, n = 36 to 200            covers
    symmetric or moderately skewed         94 - 97 %
    lognormal, sigma 1                     94 - 95 %
    a tenth of the examples carries all    94 - 98 %
    a quarter, the rest exactly nothing    97 - 98 %

More correction of the skewness (`SKEW` 1.25, `MORE` .25) would bring lognormal data to 95 - 96 %, and the last to 98 -
99 %, more than it says.

Nothing is shown where that does not hold, and `Interval.reason` says why: below `MIN_SHOWN` independent examples (of 35
examples none is among the tenth that matters in one sample of 40, and nothing in the sample tells); where so few
examples carry the variation that they are in effect fewer than `MIN_CARRIERS`; where all are equal, or one is infinite;
where the denominator of a ratio is not told from 0. No method holds for every distribution (Bahadur & Savage, Ann.
Math. Stat. 1956).

NaN means that an example has no value; it is left out of that cell and of its `n`.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped
from scipy import stats

from interp.statistics.intervals import Interval
from interp.statistics.moments import Moments, sides, summed

MIN_SHOWN = 36
"""Fewer independent examples have no interval and no p."""
INFINITE = "an example's value is infinite"
MIN_CARRIERS = 1.3
"""(sum e^2)^2 / sum e^4 of the deviations e: how many examples carry the variation; 1 where one carries it all."""
SKEW, MORE = 1.0, 0.5
"""See `interp.statistics.moments`."""
_CHUNK = 2_000_000  # floats of one [cells units] block

Clusters = Shaped[np.ndarray, " example"]
"""One name per example; examples of one name are not independent."""


def ratio_interval(
    numerator: Real[np.ndarray, "*cells example"],
    denominator: Real[np.ndarray, "*#cells example"],
    *,
    clusters: Clusters | None = None,
    confidence: float = 0.95,
    fewest: int = MIN_SHOWN,
) -> Interval:
    """Ratio of sums over examples, sum(numerator) / sum(denominator), with its interval.

    Recovery is `ratio_interval(patched - recipient, donor - recipient)`. The ratio of the sums, unlike the mean of the
    ratios, stays finite where single examples have a denominator near 0.

    Args:
        numerator: one value per cell and example; NaN where the example has none.
        denominator: broadcast against `numerator`; NaN leaves the example out as well.
        clusters: which examples hang together (those about one image); None: each stands alone.
        confidence: coverage aimed at, between 0 and 1.
        fewest: independent examples that an interval takes. Below `MIN_SHOWN` it does not cover what it says, and
            serves rules that hide numbers only.

    Returns:
        Interval over the cells, with reason and units. Where there is a reason, the ends are NaN; everything is NaN
        where n = 0 or the denominator sums to 0.

    Example:
        >>> whole = np.linspace(1, 3, 40)
        >>> recovery = fl.ratio_interval(0.5 * whole + np.tile([0.3, -0.3], 20), whole)
        >>> fl.interval_text(recovery.value, recovery.low, recovery.high)
        '0.50 [0.45, 0.55]'
    """
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.broadcast_to(np.asarray(denominator, dtype=np.float64), top.shape)
    shape, n_examples = top.shape[:-1], top.shape[-1]
    top, bottom = (one.reshape(math.prod(shape), n_examples) for one in (top, bottom))
    parts = [
        _ratios(top[some], bottom[some], clusters, confidence, fewest)
        for some in np.array_split(np.arange(len(top)), max(1, -(-top.size // _CHUNK)))
    ]
    value, low, high, n, reason, units = (
        np.concatenate(column).reshape(shape) for column in zip(*parts, strict=True)
    )
    return Interval(value, low, high, n, reason, units)


def mean_interval(values: Real[np.ndarray, "*cells example"], **settings) -> Interval:
    """Mean over examples with its interval; `settings` as in `ratio_interval`.

    Example:
        >>> mean = fl.mean_interval(np.tile([3.0, 1, 2, 5, np.nan, 4, 2, 3, 4], 5))
        >>> fl.interval_text(mean.value, mean.low, mean.high), int(mean.n)
        ('3.00 [2.60, 3.40]', 40)
    """
    return ratio_interval(values, np.ones(np.shape(values)[-1]), **settings)


def difference_interval(
    a: Real[np.ndarray, "*cells example"], b: Real[np.ndarray, "*cells example"], **settings
) -> Interval:
    """Mean of a - b over the examples that have both, with its paired interval; `settings` as in `ratio_interval`.

    Example:
        >>> rl, in_ = np.tile([3.0, 1, 2, 5, 4, 2, 3, 4], 5), np.tile([2.0, 1, 1, 4, 2, 2, 3, 2], 5)
        >>> gain = fl.difference_interval(rl, in_)
        >>> fl.interval_text(gain.value, gain.low, gain.high)
        '0.88 [0.63, 1.14]'
    """
    return mean_interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), **settings)


def mean_test(
    values: Real[np.ndarray, "*cells example"],
    *,
    clusters: Clusters | None = None,
    fewest: int = MIN_SHOWN,
) -> Float[np.ndarray, "*cells"]:
    """Two-sided p of a mean of 0, the test whose interval `mean_interval` is.

    NaN where that has no interval: no test was made there, and none counts in a correction.

    Example:
        >>> rl, in_ = np.tile([3.0, 1, 2, 5, 4, 2, 3, 4], 5), np.tile([2.0, 1, 1, 4, 2, 2, 3, 2], 5)
        >>> bool(fl.mean_test(rl - in_) < 1e-6)
        True
    """
    shape = np.shape(values)[:-1]
    given = np.asarray(values, dtype=np.float64).reshape(math.prod(shape), np.shape(values)[-1])
    infinite = np.asarray(np.isinf(given).any(-1))
    x, y, there = summed(np.where(np.isinf(given), 0.0, given), np.ones(given.shape), clusters)
    moments = Moments.of(x, y, there)
    reason = _reasons(moments, x, y, there, infinite, fewest)
    above, below = sides(*moments.studentised(0.0, SKEW), MORE)
    df = np.maximum(moments.n - 1, 1)
    p = 2 * np.minimum(stats.t.sf(above, df), stats.t.cdf(below, df))
    return np.where(reason == "", np.minimum(p, 1.0), np.nan).reshape(shape)


def _ratios(
    top: Float[np.ndarray, "cells example"],
    bottom: Float[np.ndarray, "cells example"],
    clusters: Clusters | None,
    confidence: float,
    fewest: int,
) -> tuple[np.ndarray, ...]:
    """Value, low, high, n, reason, units."""
    present = ~(np.isnan(top) | np.isnan(bottom))
    n = present.sum(-1)
    infinite = np.asarray((np.isinf(top) | np.isinf(bottom)).any(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        numerators, denominators = (np.where(present, one, 0.0).sum(-1) for one in (top, bottom))
        value = np.where((denominators == 0) | (n == 0), np.nan, numerators / denominators)
    # cells with an infinite value are given no interval
    finite_top, finite_bottom = (np.where(np.isinf(one), 0.0, one) for one in (top, bottom))
    x, y, there = summed(finite_top, finite_bottom, clusters)
    moments = Moments.of(x, y, there)
    reason = _reasons(moments, x, y, there, infinite, fewest)
    reason[(denominators == 0) & (n > 0)] = "the denominator is 0"
    quantile = stats.t.isf((1 - confidence) / 2, np.maximum(moments.n - 1, 1))
    ends = np.full((2, len(value)), np.nan)
    wanted = np.flatnonzero(reason == "")
    if len(wanted):
        some = moments[wanted]
        for side in (0, 1):
            ends[side, wanted] = _end(some, value[wanted], quantile[wanted], side)
        unbounded = wanted[~np.isfinite(ends[:, wanted]).all(0)]
        ends[:, unbounded] = np.nan
        reason[unbounded] = "the denominator is not told from 0"
    return value, ends[0], ends[1], n, reason, moments.n


def _end(
    moments: Moments,
    value: Float[np.ndarray, " cells"],
    quantile: Float[np.ndarray, " cells"],
    side: int,
) -> Float[np.ndarray, " cells"]:
    """The lower (0) or upper (1) end: the last r that is not rejected, found by doubling and halving; inf: none."""
    xx, xy, yy = moments.second
    toward = -1.0 if side == 0 else 1.0
    flipped = np.sign(moments.y) * toward  # x - r y falls with r where y > 0

    def rejected(r: np.ndarray) -> Bool[np.ndarray, " cells"]:
        above, below = sides(*moments.studentised(r, SKEW), MORE)
        return np.where(flipped < 0, above > quantile, below < -quantile)

    spread = np.sqrt(np.maximum(xx - 2 * value * xy + value**2 * yy, 0) / np.maximum(moments.n - 1, 1))
    step = np.maximum(quantile * spread / np.abs(moments.y), np.finfo(float).tiny)
    far = value + toward * step
    out = rejected(far)
    for _ in range(30):
        if out.all():
            break
        step = np.where(out, step, 2 * step)
        far = np.where(out, far, value + toward * step)
        out = rejected(far)
    near = value.copy()
    for _ in range(52):
        middle = (near + far) / 2
        beyond = rejected(middle)
        near, far = np.where(beyond, near, middle), np.where(beyond, middle, far)
    return np.where(out, (near + far) / 2, toward * math.inf)


def _reasons(
    moments: Moments,
    x: Float[np.ndarray, "*cells unit"],
    y: Float[np.ndarray, "*cells unit"],
    there: Bool[np.ndarray, "*cells unit"],
    infinite: Bool[np.ndarray, "*cells"],
    fewest: int,
) -> Shaped[np.ndarray, "*cells"]:
    """Why there is no interval and no test; "" where there are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = moments.x / moments.y
        off = np.where(there, x - ratio[..., None] * y, 0.0)
        squares = off**2
        carriers = squares.sum(-1) ** 2 / (squares**2).sum(-1)
        size = np.abs(np.where(there, x, 0.0)).max(-1, initial=0) + np.abs(
            ratio * np.abs(np.where(there, y, 0.0)).max(-1, initial=0)
        )
        same = ~(np.sqrt(squares.max(-1, initial=0)) > 1e-9 * size)
    reason = np.full(np.shape(moments.n), "", dtype=object)
    reason[~same & ~(carriers >= MIN_CARRIERS)] = "one example carries nearly all of it"
    reason[same] = "every example has the same value"
    reason[moments.n < fewest] = f"fewer than {fewest} independent examples"
    reason[infinite] = INFINITE
    reason[moments.n == 0] = "no example has a value"
    return reason
