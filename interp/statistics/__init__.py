"""Intervals, tests of means and shares, corrections for families of them, and how many examples an effect needs."""

from interp.statistics.intervals import (
    MIN_EXAMPLES,
    Interval,
    Method,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    interval_text,
    mean_of,
    wilson_interval,
)
from interp.statistics.looks import levels, over_looks
from interp.statistics.means import (
    MIN_SHOWN,
    Clusters,
    difference_interval,
    mean_interval,
    mean_test,
    ratio_interval,
)
from interp.statistics.paired import (
    Discordance,
    adjust,
    examples_for_mean,
    examples_for_shares,
    mcnemar,
    sign_flip,
    sign_flips,
)
from interp.statistics.shares import change_interval, share_interval, share_of
from interp.statistics.swaps import swap_test

__all__ = [
    "MIN_EXAMPLES",
    "MIN_SHOWN",
    "Clusters",
    "Discordance",
    "Interval",
    "Method",
    "adjust",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_ratio",
    "change_interval",
    "difference_interval",
    "examples_for_mean",
    "examples_for_shares",
    "interval_text",
    "levels",
    "mcnemar",
    "mean_interval",
    "mean_of",
    "mean_test",
    "over_looks",
    "ratio_interval",
    "share_interval",
    "share_of",
    "sign_flip",
    "sign_flips",
    "swap_test",
    "wilson_interval",
]
