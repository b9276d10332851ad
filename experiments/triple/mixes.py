"""What the rows of every supervised stage of the triple hold, and in which shares."""

from __future__ import annotations

from typing import Any

from experiments.triple.supervised import DrawRows, fresh_rows, traces

BASE_MIX = ("colour_at", "shape_at", "count", "count", "exists")
"""Perception tasks as Base meets them; counting is the hardest and comes twice."""
QUESTIONS = 4  # per image, in one row
REASONING_SHARE = 0.4  # of the cold start's rows


def mixes(config: Any) -> tuple[DrawRows, DrawRows, DrawRows]:
    """What makes the rows of Base's questions, of the cold start, and of the control."""
    base = fresh_rows(BASE_MIX, config.perception.batch, QUESTIONS, chains=False, descriptions=2)
    cold = traces(REASONING_SHARE, config.misses, config.cold_start.batch, QUESTIONS)
    share, batch = 1 - config.rl.perception, config.control_schedule.batch
    return base, cold, traces(share, config.misses, batch, QUESTIONS)
