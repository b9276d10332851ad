"""What carries RL's decision at which step of the run? IN and the checkpoints of one RL run, on one page.

`frankenlens trajectory` is the command; the pieces are `interp.pair.trajectory` and `interp.trajectory`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import xarray as xr

from experiments.bench import Bench, Planned
from experiments.commands.trajectory_claims import StepClaims, require_claims
from experiments.contract import admitted
from experiments.frame import Command, kept
from experiments.options import require_known
from experiments.settings import (
    Questions,
    QuestionSettings,
    checkpoints,
    load_questions,
    prompt_settings,
)
from hooks.errors import FrankenlensError
from interp.decision import Choice
from interp.map import POINTS
from interp.pair.pair import Pair
from interp.pair.trajectory import Step, Trajectory, steps_of
from interp.plan import decisions as plans
from interp.plan.maps import MapPlan
from interp.plan.work import Work
from interp.prompts.roles import ROLES
from interp.results.page import Account, Section
from interp.results.store import Store
from interp.statistics import interval_text
from interp.trajectory import head_survival, over_steps, step_table
from interp.trajectory.over_steps import POINTS as PATCHED
from interp.trajectory.plots import plot_trajectory


@dataclass(frozen=True)
class TrajectoryConfig(QuestionSettings):
    """Settings of a trajectory; without --in and --rl, the pair that ships, whose RL is the only step.

    Attributes:
        rl: the checkpoints of one run: folders, a pattern in quotes ('run/global_step_*'), or the folder of the run; in
            any layout that --rl of other commands takes, adapters too. They are put in the order of the numbers in
            their names.
        reference: number of the step whose decisions against IN all steps are measured on; by default the last.
        decision: decisive, first or soft: see `interp.decision.find_decisions`.
        direction: rl_to_in (sufficient?), in_to_rl (necessary?) or both.
        points: what is patched, of resid_pre, attn_out, mlp_out, head, z, vision, projector.
        roles: tokens at which it is patched, each by itself: all, decision, image, question, template, reasoning,
            answer.
        top: heads in the top set of a step; by default 10, or a quarter of them where that is fewer.
        claims: YAML file of claims (`interp.hypotheses.file`), which are put to the test at every step.
        allow_reuse: also test claims on prompts that they were found on, marked exploratory.
        n: prompts to look at.
        out: folder for trajectory.nc, trajectory.csv, trajectory_heads.csv, trajectory.png and report.html. What is
            finished of a step is kept in `finished`, and the same command goes on from there.
    """

    rl: tuple[str, ...] = ()  # type: ignore[assignment]
    reference: int | None = None
    decision: Choice = "decisive"
    direction: Literal["rl_to_in", "in_to_rl", "both"] = "rl_to_in"
    points: tuple[str, ...] = PATCHED
    roles: tuple[str, ...] = ("all",)
    top: int | None = None
    claims: Path | None = None
    allow_reuse: bool = False
    out: Path = Path("out/trajectory")

    @property
    def directions(self) -> tuple[str, ...]:
        """Both, or one."""
        return ("rl_to_in", "in_to_rl") if self.direction == "both" else (self.direction,)


def check(config: TrajectoryConfig) -> None:
    """Refuse points and roles that there are not, a reference that is no step, and steps that are not there."""
    require_known("points", config.points, POINTS)
    require_known("roles", config.roles, (*ROLES, "decision", "all"))
    for name in ("points", "roles"):
        if not getattr(config, name):
            raise FrankenlensError(f"--{name} is empty; leave it out, or give at least one.")
    if config.top is not None and config.top < 1:
        raise FrankenlensError(f"--top is {config.top}; give at least 1.")
    if config.allow_reuse and config.claims is None:
        raise FrankenlensError("--allow-reuse is of claims; give --claims as well.")
    _reference(config)
    require_claims(config.claims)


def run_steps(config: TrajectoryConfig) -> tuple[Step, ...]:
    """The checkpoints that the settings name; the shipped RL where they name none."""
    return steps_of(config.rl or [checkpoints(config)[1]])


def _reference(config: TrajectoryConfig) -> Step:
    steps = run_steps(config)
    if config.reference is None:
        return steps[-1]
    found = [step for step in steps if step.number == config.reference]
    if not found:
        told = ", ".join(str(step.number) for step in steps)
        raise FrankenlensError(f"--reference {config.reference} is no step of the run; choose of {told}.")
    return found[0]


def open_trajectory(config: TrajectoryConfig) -> Trajectory:
    """IN, and where the checkpoints are."""
    loading: dict[str, Any] = {"dtype": config.dtype, "device_map": config.device_map}
    prompts = {**prompt_settings(config), "accept": config.accept, "trace_format": config.trace_format}
    steps = [step.path for step in run_steps(config)]
    return Trajectory.from_pretrained(checkpoints(config)[0], steps, **prompts, **loading)


def measure(models: Trajectory, asked: Questions, config: TrajectoryConfig) -> Iterator[Section]:
    """The map of every step, energy, heads that stay, and claims.

    Raises:
        FrankenlensError: no prompt qualifies, or a checkpoint is no pair with IN.
    """
    run = _Run(asked, config)
    claims = None if config.claims is None else StepClaims(config)
    data = over_steps(
        models,
        asked.examples,
        config.decision,
        reference=_reference(config),
        directions=config.directions,
        points=config.points,
        roles=config.roles,
        seed=config.seed,
        keep=run.keep,
        admit=run.admit,
        look=None if claims is None else claims.look,
        **config.running,
    )
    tables = {"trajectory": step_table(data, config.top)}
    survival = _survival(data, config)
    if survival is not None:
        tables["trajectory_heads"] = survival
    if claims is not None:
        tables["trajectory_claims"] = claims.table()
    yield Section(
        "trajectory",
        "What carried RL's decision, step by step",
        "\n".join(_finding(data, survival, claims)),
        _account(data, asked, run, config, claims),
        tables,
        {"trajectory": plot_trajectory(data, config.top)},
        data,
    )


class _Run:
    """What is asked, once the first pair is open, and where its finished parts are kept."""

    def __init__(self, asked: Questions, config: TrajectoryConfig) -> None:
        self.asked, self._config, self._reference = asked, config, ""

    def admit(self, pair: Pair, examples: Sequence[Any]) -> Sequence[Any]:
        self.asked = admitted(pair, replace(self.asked, examples=examples), self._config)
        return self.asked.examples

    def keep(self, pair: Pair) -> Store | None:
        """By the pair, and by the reference, whose decisions every step is measured on."""
        if not self._reference:
            self._reference = pair.provenance()["rl"]["weights_sha256"]
        return kept(pair, self.asked.examples, self._config, reference=self._reference)


def _survival(data: xr.Dataset, config: TrajectoryConfig) -> pd.DataFrame | None:
    if not (data["point"] == "head").any():
        return None
    found = [head_survival(data, config.top, d).assign(direction=d) for d in config.directions]
    return pd.concat(found, ignore_index=True)


def _finding(data: xr.Dataset, survival: pd.DataFrame | None, claims: StepClaims | None) -> Iterator[str]:
    """What there is to explain at each step, and what carries most of it at the last."""
    steps, units = [int(step) for step in data["step"].to_numpy()], data.attrs["units"]
    reference = data.attrs["reference"]
    if len(steps) == 1:
        yield f"One checkpoint (step {steps[0]}): give several (--rl 'run/step-*') to see a run over its steps."
    decided = "; ".join(f"step {step}: {_interval(data.sel(step=step), 'decided')}" for step in steps)
    n = data.sizes["example"]
    yield f"RL minus IN on the {n} decisions of step {reference}, {units}: {decided}."
    right = ", ".join(f"{float(data['accuracy'].sel(step=step)):.2f}" for step in steps)
    yield f"Greedy answers right: IN {data.attrs['in_accuracy']:.2f}; RL {right}."
    if data.attrs["refused"]:
        yield f"No share is given: {data.attrs['refused']}."
    else:
        yield from (_carried(data, str(one)) for one in data["direction"].to_numpy())
    if survival is not None and len(steps) > 1:
        for direction, rows in survival.groupby("direction", sort=False):
            stay = ", ".join(f"{value:.0%}" for value in rows["of_reference"])
            yield (
                f"Of the {rows['k'].iloc[0]} strongest heads ({direction}), those of step {reference} too: {stay} "
                f"(by chance {rows['chance'].iloc[0]:.0%} of {rows['n_heads'].iloc[0]})."
            )
    if claims is not None:
        yield from claims.finding()


def _carried(data: xr.Dataset, direction: str) -> str:
    """The strongest components of the reference step, and their shares at every step."""
    one = data.sel(direction=direction)
    last: Any = one.sel(step=data.attrs["reference"])
    cells = last[["share", "margin", "beyond"]].to_dataframe().reset_index()
    cells = cells[cells["beyond"].astype(bool)].sort_values("margin", ascending=False).head(3)
    if cells.empty:
        return f"{direction}: no component is beyond random directions at step {data.attrs['reference']}."
    told = []
    for component, role in zip(cells["component"], cells["role"], strict=True):
        cell = one.sel(component=component, role=role).transpose("step", ...)
        shares = ", ".join(_interval(cell.isel(step=i), "share") for i in range(cell.sizes["step"]))
        told.append(f"{component} at {role} {shares}")
    return f"{direction}, shares of the final decision, step by step: {'; '.join(told)}."


def _interval(data: Any, name: str) -> str:
    return interval_text(*(float(data[name + suffix]) for suffix in ("", "_low", "_high")))


def _account(
    data: xr.Dataset, asked: Questions, run: _Run, config: TrajectoryConfig, claims: StepClaims | None
) -> Account:
    decisions = json.loads(data.attrs["decisions"])
    reference = data.attrs["reference"]
    definition = (
        f"activation patching of one component at the tokens of one role, {data.attrs['metric']}, "
        f"{data.attrs['units']}, of every checkpoint on the decisions ({decisions['choice']}) between IN and step "
        f"{reference}; share = (patched − recipient) / (what step {reference} and IN differ by), ratio of sums over "
        "examples; beyond: |mean effect| above that of random directions with the norm of the donor's difference at "
        "each token (swap test), no noise pairs being run; energy: norm of W_RL − W_IN over that of W_IN; top heads: "
        "those farthest above random directions; IN's traces and clean runs are those of all steps"
    )
    if data.attrs["in_again"]:
        definition += f" (IN was run again on {data.attrs['in_again']} batches for want of memory)"
    if claims is not None:
        definition += f"; {claims.definition}"
    left_out = {f"no decision: {reason}": n for reason, n in decisions["excluded"].items()}
    left_out = {**{k: n for k, n in run.asked.left_out.items() if k not in asked.left_out}, **left_out}
    return Account(
        definition,
        f"{decisions['n_qualify']} decisions of {decisions['n_prompts']} prompts, {data.sizes['step']} steps",
        "none" if claims is None else claims.correction,
        config.seed,
        left_out=left_out,
        counts={"examples": decisions["n_prompts"], "decisions": decisions["n_qualify"]},
    )


def work(bench: Bench, config: TrajectoryConfig) -> Iterator[Work]:
    """What `measure` computes, counted and not run."""
    asked, runs, choice, steps = bench.workload, bench.runs(), config.decision, len(run_steps(config))
    for one in plans.found_decisions(runs, asked, choice):
        yield one.times(asked.scale)
    yield plans.null_pairs(runs, asked, choice).times(asked.scale)
    some = asked.traces if choice == "soft" else asked.cut
    share = asked.scale * (1.0 if choice == "soft" else asked.decided)
    settings: dict[str, Any] = {"points": config.points, "at_tokens": bench.at_tokens, "roles": config.roles}
    settings |= {"batch_size": config.batch_size, "kinds": ("donor", "random")}
    reads, several = plans.reads_of(choice), len(config.directions)
    one = MapPlan(bench.vlm, reads, several, **settings).work(some, f"component maps of {steps} steps")
    yield one.times(share * steps)
    if steps > 1:
        tokens = [asked.trace_tokens] * len(asked.prompts)
        written = runs.written("greedy text of RL at the other steps", asked.prompts, tokens)
        yield written.times(asked.scale * (steps - 1))


def assumed(bench: Bench, config: TrajectoryConfig) -> Iterator[str]:
    """What `work` takes for granted."""
    yield "one checkpoint is in memory at a time, beside IN; IN's clean runs are counted with every step's map"
    if config.claims is not None:
        yield "claims are not counted: `frankenlens plan test` says what they take on one pair"


PLAN = Planned(work, assumed=assumed)
COMMAND = Command(TrajectoryConfig, check, load_questions, open_trajectory, measure, plan=PLAN)
