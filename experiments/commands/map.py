"""Which components carry what RL changed? The component map of a pair, from checkpoints to a page.

`frankenlens map` is the command; the pieces are `interp.decision` and `interp.map`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.bench import Bench, Planned
from experiments.frame import Command, kept
from experiments.given import TraceSettings
from experiments.options import require_known
from experiments.settings import Questions, load_pair, load_questions
from hooks.errors import FrankenlensError
from interp.decision import (
    Choice,
    find_decisions,
    null_pair_denominator,
    recovery_refused,
    two_by_two,
)
from interp.map import DIRECTIONS, MAP_POINTS, POINTS, component_map, map_section, noise_cells, summarise
from interp.pair.pair import Pair
from interp.plan import decisions as plans
from interp.plan.maps import MapPlan
from interp.plan.work import Work
from interp.results.page import Section


@dataclass(frozen=True)
class MapConfig(TraceSettings):
    """Settings of the component map; the defaults run on the pair that ships with the package.

    Attributes:
        direction: rl_to_in (sufficient?), in_to_rl (necessary?) or both.
        points: what is patched, of resid_pre, attn_out, mlp_out, head, z, vision, projector.
        decision: decisive, first or soft: see `interp.decision.find_decisions`.
        out: folder for map.nc, map.csv, map.png and report.html.
    """

    direction: Literal["both", "rl_to_in", "in_to_rl"] = "both"
    points: tuple[str, ...] = MAP_POINTS
    decision: Choice = "decisive"
    out: Path = Path("out/map")


def check(config: MapConfig) -> None:
    """Refuse points that there are not."""
    require_known("points", config.points, POINTS)
    if not config.points:
        raise FrankenlensError(f"--points is empty; choose of {', '.join(POINTS)}.")


def measure(pair: Pair, asked: Questions, config: MapConfig) -> Iterator[Section]:
    """Find the decisions, patch, and put intervals, controls and the 2x2 together.

    Raises:
        FrankenlensError: no prompt qualifies; the message says why not.
    """
    keep, running = kept(pair, asked.examples, config), config.running
    decisions = find_decisions(
        pair, asked.examples, config.decision, progress=True, keep=keep, traces=asked.traces, **running
    )
    decisions.require_some()
    directions = list(DIRECTIONS) if config.direction == "both" else [config.direction]
    settings: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
    effects = component_map(pair, decisions, directions, config.points, keep=keep, **settings)
    roles = [str(role) for role in effects["role"].to_numpy()]
    noise = noise_cells(pair, decisions, directions, config.points, roles, keep=keep, **settings)
    nulls = null_pair_denominator(pair, decisions, config.seed, config.batch_size)
    refused = recovery_refused(decisions, nulls)
    summary = summarise(effects, noise=noise, nulls=nulls, refused=refused, seed=config.seed)
    if config.decision != "soft":
        summary["two_by_two"] = two_by_two(pair, decisions, config.batch_size)
    summary.attrs["decisions"] = json.dumps(decisions.summary())
    yield map_section(summary, seed=config.seed)


def work(bench: Bench, config: MapConfig) -> Iterator[Work]:
    """What `measure` computes, counted and not run."""
    asked, runs, choice = bench.workload, bench.runs(), config.decision
    for one in plans.found_decisions(runs, asked, choice):
        yield one.times(asked.scale)
    some = asked.traces if choice == "soft" else asked.cut
    share = asked.scale * (1.0 if choice == "soft" else asked.decided)
    settings: dict[str, Any] = {"points": config.points, "at_tokens": bench.at_tokens}
    settings |= {"batch_size": config.batch_size}
    directions = 2 if config.direction == "both" else 1
    yield MapPlan(bench.vlm, plans.reads_of(choice), directions, **settings).work(some).times(share)
    noise = MapPlan(bench.vlm, plans.reads_of(choice), 1, kinds=("donor",), **settings)
    yield plans.noise_maps(runs, noise, asked, choice)
    yield plans.null_pairs(runs, asked, choice).times(asked.scale)
    if choice != "soft":
        yield plans.two_by_two(runs, asked).times(asked.scale)


COMMAND = Command(MapConfig, check, load_questions, load_pair, measure, plan=Planned(work), on_ray=True)
