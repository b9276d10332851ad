"""Intervals as objects and as text; plain bootstraps of ratios, means and paired differences; Wilson's of a share.

Examples are the unit of resampling. NaN means that an example has no value (a role can be empty
in it); it is left out of that cell and of its `n`, and a cell without examples is NaN with n = 0.

Source of the BCa interval: Efron, "Better Bootstrap Confidence Intervals", JASA 1987.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, SupportsFloat

import numpy as np
from jaxtyping import Bool, Float, Int, Real, Shaped
from scipy import stats

Method = Literal["bca", "percentile"]

MIN_EXAMPLES = 8
"""Rules that hide a number (a ratio whose denominator is not told from 0) and plain bootstraps take this many."""

_CHUNK = 4_000_000  # floats of one [cells resamples] block: 32 MB


@dataclass(frozen=True)
class Interval:
    """Estimates with confidence intervals, one per cell.

    Attributes:
        value, low, high: the estimate and the ends of its interval, in the units of the data.
        n: the number of examples behind each cell.
        reason: why a cell has no interval, "" where it has one; None: nobody said.
        units: how many independent units (clusters) the examples make; None: as many as examples.
    """

    value: Float[np.ndarray, "*cells"]
    low: Float[np.ndarray, "*cells"]
    high: Float[np.ndarray, "*cells"]
    n: Int[np.ndarray, "*cells"]
    reason: Shaped[np.ndarray, "*cells"] | None = None
    units: Int[np.ndarray, "*cells"] | None = None

    def includes(self, value: float) -> Bool[np.ndarray, "*cells"]:
        """Where the interval contains `value`; False where there is no interval."""
        return np.asarray((self.low <= value) & (value <= self.high))

    def overlaps(self, other: Interval) -> Bool[np.ndarray, "*cells"]:
        """Where the two intervals share a point; False where either has no interval."""
        return np.asarray((self.low <= other.high) & (other.low <= self.high))

    def __getitem__(self, index) -> Interval:
        own = (getattr(self, field.name) for field in fields(Interval))
        return Interval(*(None if one is None else np.asarray(one[index]) for one in own))  # type: ignore[arg-type]


def interval_text(value: SupportsFloat, low: SupportsFloat, high: SupportsFloat) -> str:
    """`value [low, high]` for people; "–" where there is no value.

    Two digits, three where all is below 0.1, and as many as the largest of the three needs to show two that count; a
    power of ten below 1e-6. A value without interval has the same digits, less the zeros it would end in.

    Example:
        >>> fl.interval_text(0.314, 0.25, 0.381)
        '0.31 [0.25, 0.38]'
    """
    value, low, high = float(value), float(low), float(high)
    if math.isnan(value):
        return "–"
    known = not (math.isnan(low) or math.isnan(high))
    largest = max(map(abs, (value, low, high) if known else (value,)))
    form = f".{_digits(largest)}f" if largest >= 1e-6 or not largest else ".1e"
    text = f"{value:{form}}"
    if known:
        text += f" [{low:{form}}, {high:{form}}]"
    else:
        text = (text if "e" in text else text.rstrip("0").rstrip(".")) + " [no interval]"
    return text.replace("-", "−")


def _digits(largest: float) -> int:
    """Behind the point."""
    if not 0 < largest < 0.1:
        return 2 if largest else 3
    return max(3, 1 - math.floor(math.log10(largest)))


def bootstrap_ratio(
    numerator: Real[np.ndarray, "*cells example"],
    denominator: Real[np.ndarray, "*#cells example"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Ratio of sums over examples, sum(numerator) / sum(denominator), with its bootstrap interval.

    A plain bootstrap, to be compared with others'. It covers less than it says: a nominal 95 % interval 88 % of normal
    data at n = 8 and 93 % at 20, 79 and 89 % of lognormal data. What this package shows is `ratio_interval`'s.

    Args:
        numerator: one value per cell and example; NaN where the example has none.
        denominator: broadcast against `numerator`; NaN leaves the example out as well.
        confidence: coverage aimed at, between 0 and 1.
        resamples: bootstrap draws of the examples.
        seed: of the draws.
        method: "bca" (bias-corrected and accelerated) or "percentile".

    Returns:
        Interval over the cells. The ends are NaN where n < MIN_EXAMPLES, everything is NaN where n = 0 or the
        denominator sums to 0.

    Example:
        >>> moved, whole = np.array([1.0, 2, 0, 1, 2, 1, 1, 0]), np.array([2.0, 3, 1, 2, 2, 2, 3, 1])
        >>> recovery = fl.bootstrap_ratio(moved, whole)  # BCa, as SciPy's
        >>> fl.interval_text(recovery.value, recovery.low, recovery.high)
        '0.50 [0.33, 0.69]'
    """
    top = np.asarray(numerator, dtype=np.float64)
    shape, n_examples = top.shape[:-1], top.shape[-1]
    n_cells = int(np.prod(shape))
    bottom = np.broadcast_to(np.asarray(denominator, dtype=np.float64), top.shape)
    top, bottom = top.reshape(n_cells, n_examples), bottom.reshape(n_cells, n_examples)
    present = ~(np.isnan(top) | np.isnan(bottom))

    out = np.full((3, n_cells), np.nan)
    patterns, group = np.unique(present, axis=0, return_inverse=True)
    for index, kept in enumerate(patterns):
        n = int(kept.sum())
        if n == 0:
            continue
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        cells = np.flatnonzero(np.ravel(group) == index)
        for some in np.array_split(cells, max(1, -(-len(cells) * resamples // _CHUNK))):
            out[:, some] = _ratio(top[some][:, kept], bottom[some][:, kept], weights, confidence, method)
    value, low, high = (row.reshape(shape) for row in out)
    return Interval(value, low, high, present.sum(-1).reshape(shape))


def bootstrap_mean(values: Real[np.ndarray, "*cells example"], **settings) -> Interval:
    """Mean over examples with its bootstrap interval; `settings` as in `bootstrap_ratio`.

    Example:
        >>> mean = fl.bootstrap_mean(np.array([3.0, 1, 2, 5, np.nan, 4, 2, 3, 4]))
        >>> fl.interval_text(mean.value, mean.low, mean.high), int(mean.n)
        ('3.00 [2.25, 3.88]', 8)
    """
    return bootstrap_ratio(values, np.ones(values.shape[-1]), **settings)


def bootstrap_difference(
    a: Real[np.ndarray, "*cells example"], b: Real[np.ndarray, "*cells example"], **settings
) -> Interval:
    """Mean of a - b over the examples that have both, with its paired bootstrap interval.

    `settings` as in `bootstrap_ratio`.

    Example:
        >>> rl, in_ = np.array([3.0, 1, 2, 5, 4, 2, 3, 4]), np.array([2.0, 1, 1, 4, 2, 2, 3, 2])
        >>> gain = fl.bootstrap_difference(rl, in_)
        >>> fl.interval_text(gain.value, gain.low, gain.high)
        '0.88 [0.38, 1.50]'
    """
    return bootstrap_mean(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), **settings)


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Share of successes with Wilson's score interval (an accuracy, say); NaN where n = 0.

    Raises:
        ValueError: `successes` is negative or exceeds `n`.

    Example:
        >>> share = fl.wilson_interval(9, 10)
        >>> fl.interval_text(share.value, share.low, share.high)
        '0.90 [0.60, 0.98]'
    """
    if n == 0 and successes == 0:
        nan = np.array(np.nan)
        return Interval(nan, nan, nan, np.array(0))
    found = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(*(np.array(x) for x in (successes / n, float(found.low), float(found.high), n)))


def mean_of(values: Float[np.ndarray, " example"]) -> float:
    """Mean over the examples that have a value; NaN where none has."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")


def _ratio(
    top: Float[np.ndarray, "cells example"],
    bottom: Float[np.ndarray, "cells example"],
    weights: Float[np.ndarray, "resamples example"],
    confidence: float,
    method: Method,
) -> Float[np.ndarray, "3 cells"]:
    """Value, low and high of each cell; `weights` counts how often a resample drew each example."""
    # a resample's or a leave-one-out denominator may be 0: the ratio is then infinite, as it should be
    with np.errstate(divide="ignore", invalid="ignore"):
        sums = top.sum(-1), bottom.sum(-1)
        value = np.where(sums[1] == 0, np.nan, sums[0] / sums[1])
        if top.shape[-1] < MIN_EXAMPLES:
            return np.stack([value, np.full_like(value, np.nan), np.full_like(value, np.nan)])
        draws = (top @ weights.T) / (bottom @ weights.T)
        tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
        if method == "bca":
            left_out = (sums[0][:, None] - top) / (sums[1][:, None] - bottom)
            levels = _bca_levels(value, draws, left_out, tails)
        else:
            levels = np.tile(tails, (len(value), 1))
    # order statistics, not interpolated: a draw may be infinite
    ranks = np.clip(np.ceil(levels * draws.shape[-1]).astype(int) - 1, 0, draws.shape[-1] - 1)
    ends = np.take_along_axis(np.sort(draws, axis=-1), ranks, axis=-1)
    ends[np.isnan(value) | np.isnan(draws).any(-1)] = np.nan  # 0 / 0 in a resample: no interval can be given
    return np.stack([value, *ends.T])


def _bca_levels(
    value: Float[np.ndarray, "cells"],
    draws: Float[np.ndarray, "cells resamples"],
    left_out: Float[np.ndarray, "cells example"],
    tails: Float[np.ndarray, "2"],
) -> Float[np.ndarray, "cells 2"]:
    """Quantile levels of the BCa interval; the plain tails where the draws do not vary about the value."""
    below = ((draws < value[:, None]).mean(-1) + (draws <= value[:, None]).mean(-1)) / 2
    bias = stats.norm.ppf(below)[:, None]
    spread = left_out.mean(-1, keepdims=True) - left_out
    skew = ((spread**3).sum(-1) / (6 * (spread**2).sum(-1) ** 1.5))[:, None]
    shifted = bias + stats.norm.ppf(tails)
    levels = stats.norm.cdf(bias + shifted / (1 - skew * shifted))
    return np.where(np.isfinite(levels), levels, tails)
