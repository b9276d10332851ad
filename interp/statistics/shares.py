"""Shares of right answers and changes of them, with intervals: exact where nothing varies, wider in clusters.

Answers are 1, 0 or NaN (none, left out). A sample in which all are alike is no proof that all others are: of n answers
without a wrong one, up to 1 - (alpha / 2)^(1 / n) may be wrong at level alpha (the rule of three: Hanley &
Lippman-Hand, JAMA 1983; Clopper & Pearson, Biometrika 1934).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Real
from scipy import stats

from interp.statistics.intervals import Interval
from interp.statistics.means import Clusters, ratio_interval
from interp.statistics.moments import summed

MIN_CLUSTERS = 10
"""Fewer clusters in effect, (sum m)^2 / sum m^2 of their sizes m, give a share no interval."""


def share_interval(
    right: Real[np.ndarray, " example"], clusters: Clusters | None = None, *, confidence: float = 0.95
) -> Interval:
    """Share of 1 among answers, with Wilson's interval.

    Where several answers hang together (questions about one image), n is divided by the design effect, the variance of
    the share over clusters by that of as many independent answers (Kish, Survey Sampling, 1965), and Student's t takes
    the normal's place, with as many clusters as there are in effect; where all answers are alike, each of these counts
    as one. The variance is the larger of the one between clusters and the one that the intraclass correlation gives
    (by analysis of variance: Fleiss, Statistical Methods for Rates and Proportions, 1981): where a few clusters are
    large, the first is too small as soon as these happen to agree. Sizes from equal to 5 of 30 beside 100 of 1,
    correlations from 0 to 1, shares .7 and .9: 93 to 99 %; by the first variance alone, all clusters counted, 50 to 97.

    Example:
        >>> share = fl.statistics.share_interval(np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 0]))
        >>> fl.interval_text(share.value, share.low, share.high)
        '0.90 [0.60, 0.98]'
    """
    given = np.asarray(right, dtype=np.float64)
    x, y, there = summed(given, np.ones(given.shape), clusters)
    n, units = int(y.sum()), int(there.sum())
    if not n:
        return _none("no example has a value", 0, 0)
    share, effective = float(x.sum() / n), float(n)
    z = float(stats.norm.isf((1 - confidence) / 2))
    if units < n:
        in_effect = _in_effect(y)
        if in_effect < MIN_CLUSTERS:
            return _none(_too_few(units), n, units, share)
        effective = in_effect
        if 0 < share < 1:
            effective = min(share * (1 - share) / _variance(x[there], y[there]), n)
        z = float(stats.t.isf((1 - confidence) / 2, in_effect - 1))
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2))
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    if share in (0.0, 1.0):  # rounding must not move a bound off the share itself
        low, high = (0.0, high) if share == 0 else (low, 1.0)
    return Interval(*map(np.array, (share, low, high, n, "", units)))  # type: ignore[arg-type]


def change_interval(
    after: Real[np.ndarray, " example"],
    before: Real[np.ndarray, " example"],
    clusters: Clusters | None = None,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Change in the share of 1 among paired answers (after - before), with its interval.

    Of independent answers Agresti and Min's ("Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 2005): half an answer is added to each cell of the table; of answers that changed one way
    only, not less than Wilson's interval of their share. Where no answer changed, or all in
    the same way, exact bounds of the ones that were not drawn. Of clusters `ratio_interval`'s.

    Example:
        >>> gain = fl.statistics.change_interval(np.ones(60), np.ones(60))
        >>> fl.interval_text(gain.value, gain.low, gain.high)
        '0.000 [−0.060, 0.060]'
    """
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    known = change[~np.isnan(change)]
    _, sizes, there = summed(change, np.ones(change.shape), clusters)
    n, units = len(known), int(there.sum())
    if not n:
        return _none("no example has a value", 0, 0)
    level, value = (1 - confidence) / 2, float(known.mean())
    if (known == known[0]).all():
        in_effect = _in_effect(sizes)
        if units < n and in_effect < MIN_CLUSTERS:
            return _none(_too_few(units), n, units, value)
        unseen = 1 - level ** (1 / in_effect)  # of each kind that no unit shows
        # of a change that all share, the others may be at the far end
        spare = unseen if value == 0 else 2 * unseen
        ends = max(value - spare, -1.0), min(value + spare, 1.0)
        return Interval(*map(np.array, (value, *ends, n, "", units)))  # type: ignore[arg-type]
    if units < n:
        return ratio_interval(change, np.ones(len(change)), clusters=clusters, confidence=confidence)
    gained, lost = ((known == side).sum() + 0.5 for side in (1, -1))
    size, z = n + 2, stats.norm.isf(level)
    centre = float(gained - lost) / size
    half = z * math.sqrt(gained + lost - (gained - lost) ** 2 / size) / size
    low, high = centre - half, centre + half
    if value != 0 and not {1.0, -1.0} <= set(known.tolist()):  # a change one way only is a share
        one_way = share_interval(np.abs(known), confidence=confidence)
        sign = math.copysign(1.0, value)
        ends = sorted((sign * float(one_way.low), sign * float(one_way.high)))
        low, high = min(low, ends[0]), max(high, ends[1])
    ends = max(low, -1.0), min(high, 1.0)
    return Interval(*map(np.array, (value, *ends, n, "", units)))  # type: ignore[arg-type]


def share_of(
    right: Float[np.ndarray, " example"], clusters: Clusters | None = None
) -> tuple[float, float, float]:
    """`share_interval` (95 %) as value, low, high."""
    found = share_interval(right, clusters)
    return float(found.value), float(found.low), float(found.high)


def _in_effect(sizes: Float[np.ndarray, " unit"]) -> float:
    """How many clusters of equal sizes would say as much, were all answers of a cluster alike."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _too_few(units: int) -> str:
    if units < MIN_CLUSTERS:
        return f"fewer than {MIN_CLUSTERS} independent clusters"
    return f"of {units} clusters a few hold most examples: in effect there are fewer than {MIN_CLUSTERS}"


def _variance(right: Float[np.ndarray, " unit"], sizes: Float[np.ndarray, " unit"]) -> float:
    """Of a share of answers in clusters; above 0 where the share is neither 0 nor 1."""
    units, n = len(sizes), float(sizes.sum())
    share, own = float(right.sum()) / n, right / sizes
    between = float((sizes * (own - share) ** 2).sum()) / (units - 1)
    within = float((right * (1 - own)).sum()) / (n - units)
    usual = (n - float((sizes**2).sum()) / n) / (units - 1)
    correlation = min(max((between - within) / (between + (usual - 1) * within), 0.0), 1.0)
    by_correlation = share * (1 - share) * float((sizes * (1 + (sizes - 1) * correlation)).sum()) / n**2
    over_clusters = units / (units - 1) * float(((right - share * sizes) ** 2).sum()) / n**2
    return max(by_correlation, over_clusters)


def _none(why: str, n: int, units: int, value: float = math.nan) -> Interval:
    return Interval(*map(np.array, (value, math.nan, math.nan, n, why, units)))  # type: ignore[arg-type]
