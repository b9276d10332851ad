"""Intervals, paired tests, corrections for families of them, and how many examples an effect needs."""

from interp.statistics.intervals import (
    MIN_EXAMPLES,
    Interval,
    Method,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    interval_text,
    mean_of,
    share_of,
    wilson_interval,
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

__all__ = [
    "MIN_EXAMPLES",
    "Discordance",
    "Interval",
    "Method",
    "adjust",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_ratio",
    "examples_for_mean",
    "examples_for_shares",
    "interval_text",
    "mcnemar",
    "mean_of",
    "share_of",
    "sign_flip",
    "sign_flips",
    "wilson_interval",
]
