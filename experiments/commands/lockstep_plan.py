"""What `frankenlens lockstep` takes, counted from its settings and not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.bench import Bench
from interp.plan import decisions as plans
from interp.plan.lockstep import directions, moved, steered
from interp.plan.maps import MapPlan
from interp.plan.work import Work

POINTS = ("attn_out", "mlp_out", "head")
"""What the small map patches that chooses components."""
STEERED = 2
"""Directions of a site: the mean, and the first principal one."""


def work(bench: Bench, config: Any) -> Iterator[Work]:
    """Its steps."""
    asked, runs, tokens = bench.workload, bench.runs(), bench.trace_tokens
    used = _used(bench, config)
    if used:
        for one in plans.found_decisions(runs, asked, "decisive"):
            yield one.times(used / len(asked.prompts))
        settings: dict[str, Any] = {"at_tokens": bench.at_tokens, "batch_size": config.batch_size}
        small = MapPlan(bench.vlm, plans.of_decision, 1, POINTS, ["all"], **settings)
        share = asked.decided * used / len(asked.prompts)
        yield small.work(asked.cut, "small map, which chooses the components").times(share)
    fresh = (asked.n - used) / len(asked.prompts)
    sets = 1 if config.components else len(set(config.top))
    yield moved(runs, asked.prompts, tokens, sets * (1 + config.n_random)).times(fresh)
    if config.steer is not None:
        yield directions(runs, asked.prompts, tokens).times(used / len(asked.prompts))
        conditions = STEERED * (1 + config.n_random) * len(config.coefficients)
        yield steered(runs, asked.prompts, tokens, conditions).times(fresh)


def assumed(bench: Bench, config: Any) -> Iterator[str]:
    """What `work` takes for granted."""
    own = bench.settings
    if _used(bench, config):
        yield (
            f"of every other question {own.decided:.0%} have a decisive token, at {own.decided_at:.0%} of the trace, "
            f"after {own.tries:g} tries; a map finds as many components as --top wants"
        )


def _used(bench: Bench, config: Any) -> int:
    """Questions that components are chosen on: every other one, where they are neither named nor of a map."""
    return 0 if config.components or config.map is not None else -(-bench.n // 2)
