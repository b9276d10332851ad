"""The component map of a run over its steps, on the decisions of one of them, so that its numbers can be compared.

Decisions are found once, between IN and the last checkpoint (or another), and every checkpoint is measured on them: the
same prompts up to the same tokens, the same metric. What IN runs for that is the same for every step and is run once:
its traces, its choices along RL's traces, and its clean runs, which interventions start from and donate from
(`interp.map.clean.CleanRuns`). IN and one checkpoint are in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hooks.errors import FrankenlensError
from interp.decision import Choice, DecisionSet, find_decisions, null_pair_denominator, recovery_refused
from interp.map import component_map, summarise
from interp.map.clean import CleanRuns
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.pair.trajectory import Step, Trajectory
from interp.questions.examples import Example, clusters_of
from interp.questions.grading import Ungraded, grade
from interp.results.store import Store, under
from interp.statistics import mean_interval, ratio_interval
from interp.trajectory.energy import update_energy

POINTS = ("attn_out", "mlp_out", "head")
Keeping = Callable[[Pair], Store | None]


@dataclass(frozen=True, eq=False)
class _Asked:
    """What every step is measured with."""

    decisions: DecisionSet
    examples: Sequence[Example]
    clean: CleanRuns
    keep: Keeping
    directions: Sequence[str]
    points: Sequence[str]
    roles: Sequence[str]
    max_new_tokens: int
    batch_size: int
    seed: int
    progress: bool


def over_steps(
    trajectory: Trajectory,
    examples: Sequence[Example],
    choice: Choice | str = "decisive",
    *,
    reference: Step | None = None,
    directions: Sequence[str] = ("rl_to_in",),
    points: Sequence[str] = POINTS,
    roles: Sequence[str] = ("all",),
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    keep: Keeping | None = None,
    admit: Callable[[Pair, Sequence[Example]], Sequence[Example]] | None = None,
    look: Callable[[Step, Pair, DecisionSet], None] | None = None,
) -> xr.Dataset:
    """Map, energy of the update and accuracy of every checkpoint of a run.

    Args:
        trajectory: IN and the checkpoints.
        examples: what they are asked.
        choice: which decisions: see `interp.decision.find_decisions`.
        reference: the checkpoint whose decisions against IN all are measured on; by default the last.
        directions, points, roles, batch_size, seed: as in `interp.map.component_map.component_map`.
        max_new_tokens: longest trace.
        progress: bars.
        keep: from the pair of a step to where its finished parts are kept.
        admit: from the reference's pair and the examples to those of them that are asked.
        look: called with each step while it is open.

    Returns:
        Over step (its number), direction, component, role and example, beside what
        `interp.map.summary.summarise` makes of each step's map (effect, effect_mean, p_random, margin, beyond, ...):

            share         sum(patched - recipient) / sum(donor - recipient), the difference being that of the reference
                          checkpoint and IN, so that all steps are shares of one thing; with _low and _high
            decided       metric of the step's RL minus IN's on the decisions, in the metric's units; with _low and
                          _high
            accuracy      share of the examples that the step's greedy answers get right, of those that can be graded
            fro_norm, relative_norm
                          of the update of every address (`update_energy`)

        and the attributes reference, in_accuracy, refused, decisions, in_runs (batches that IN was run on) and
        in_again (batches that it was run on again for want of room).

    Raises:
        FrankenlensError: no decision qualifies, a checkpoint is no pair with IN, or what `component_map` refuses.
    """
    reference = trajectory.last if reference is None else reference
    if reference not in trajectory.steps:
        raise FrankenlensError(f"{reference} is no step of this trajectory: {list(trajectory.steps)}")
    keep = keep or (lambda pair: None)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with trajectory.at(reference) as pair:
        examples = examples if admit is None else admit(pair, examples)
        kept = keep(pair)
        decisions = find_decisions(pair, examples, choice, **settings, progress=progress, keep=kept)
        decisions.require_some()
        nulls = null_pair_denominator(pair, decisions, seed, batch_size)
        refused = recovery_refused(decisions, nulls)
        clean = CleanRuns(trajectory.in_)
        asked = _Asked(
            decisions,
            examples,
            clean,
            keep,
            directions,
            points,
            roles,
            max_new_tokens,
            batch_size,
            seed,
            progress,
        )
        found = {reference: _measured(pair, asked, decisions.rl_correct)}
        if look is not None:
            look(reference, pair, decisions)
    for step in trajectory.steps:
        if step != reference:
            with trajectory.at(step) as pair:
                found[step] = _measured(pair, asked)
                if look is not None:
                    look(step, pair, decisions)
    steps = [found[step] for step in trajectory.steps]
    numbers = pd.Index([step.number for step in trajectory.steps], name="step")
    out: Any = xr.concat(steps, numbers, combine_attrs="drop_conflicts")
    out = out.assign_coords(checkpoint=("step", [str(step.path) for step in trajectory.steps]))
    return _with_shares(out, decisions, reference, refused, clean)


def _measured(pair: Pair, asked: _Asked, correct: np.ndarray | None = None) -> xr.Dataset:
    """One step."""
    kept = asked.keep(pair)
    effects = component_map(
        pair,
        asked.decisions,
        asked.directions,
        asked.points,
        asked.roles,
        asked.batch_size,
        asked.progress,
        kept,
        further=(),
        seed=asked.seed,
        clean=asked.clean,
    )
    one = summarise(effects, seed=asked.seed)
    energy = update_energy(pair.in_, pair.rl).set_index("address")
    for name in ("fro_norm", "relative_norm"):
        one[name] = ("address", energy[name].to_numpy())
    one = one.assign_coords(address=list(energy.index))
    right = _right(pair, asked, kept) if correct is None else correct
    one["right"] = ("looked_at_row", np.asarray(right, dtype=float))
    return one


def _right(pair: Pair, asked: _Asked, keep: Store | None) -> np.ndarray:
    """Whether RL's greedy answers are right; NaN where one cannot be graded."""
    prompts = [pair.builder.build(example) for example in asked.examples]
    several = (asked.max_new_tokens, asked.batch_size, asked.progress)
    written = greedy(pair.rl, prompts, *several, under(keep, "rl"))
    found = []
    for prompt, ids in zip(prompts, written, strict=True):
        try:
            found.append(float(grade(prompt.with_tokens(ids).trace.answer, prompt.example)))
        except Ungraded:
            found.append(np.nan)
    return np.array(found)


def _with_shares(
    out: xr.Dataset, decisions: DecisionSet, reference: Step, refused: str, clean: CleanRuns
) -> xr.Dataset:
    """What is compared between steps, and the attributes."""
    cells = ("step", "direction", "component", "role")
    effect = out["effect"].transpose(*cells, "example").to_numpy()
    whole = (out["donor"] - out["recipient"]).sel(step=reference.number)
    difference = whole.transpose("direction", "example").to_numpy()[None, :, None, None, :]
    settings: dict[str, Any] = {"clusters": clusters_of(out)}
    share = ratio_interval(effect, np.broadcast_to(difference, effect.shape), **settings)
    of_rl = {"rl_to_in": 1, "in_to_rl": -1}[str(out["direction"].to_numpy()[0])]
    moved = (out["donor"] - out["recipient"]).isel(direction=0).transpose("step", "example").to_numpy()
    decided = mean_interval(of_rl * moved, **settings)
    for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high")):
        out["share" + suffix] = (cells, np.where(bool(refused), np.nan, getattr(share, end)), {"units": "1"})
        out["decided" + suffix] = (("step",), getattr(decided, end), {"units": decisions.metric.units})
    out["accuracy"] = ("step", np.nanmean(out["right"].transpose("step", ...).to_numpy(), axis=1))
    out.attrs |= {
        "reference": reference.number,
        "in_accuracy": float(decisions.in_correct.mean()),
        "refused": refused,
        "decisions": json.dumps(decisions.summary()),
        "in_runs": clean.made,
        "in_again": clean.again,
    }
    return out
