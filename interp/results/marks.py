"""Intervals as small marks beside their numbers: one scale for all that stand in a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from interp.statistics import Interval

WIDTH, MARGIN = 90, 4
"""Of the drawing, in its own units."""


@dataclass(frozen=True)
class Mark:
    """Where an interval of one cell is drawn."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scale:
    """From numbers to places; 0 is always on it."""

    low: float
    high: float

    @classmethod
    def of(cls, intervals: Iterable[Interval]) -> Scale:
        """The scale that all of them fit on."""
        every = [float(end) for one in intervals for end in (one.value, one.low, one.high)]
        known = [0.0, *(end for end in every if math.isfinite(end))]
        return cls(min(known), max(known))

    def place(self, value: float) -> float:
        """Where a number is, from the left."""
        share = (value - self.low) / max(self.high - self.low, 1e-12)
        return round(MARGIN + (WIDTH - 2 * MARGIN) * share, 1)

    def mark(self, interval: Interval) -> Mark | None:
        """A value without an interval is a bare dot, no value is nothing."""
        value, low, high = (float(end) for end in (interval.value, interval.low, interval.high))
        if not math.isfinite(value):
            return None
        known = math.isfinite(low) and math.isfinite(high)
        ends = (low, high) if known else (value, value)
        return Mark(*map(self.place, (value, *ends)))
