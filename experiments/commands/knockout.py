"""Which information routes did RL open or close? Attention knockout between roles, by layers, in IN against RL.

`frankenlens knockout` is the command; the pieces are in `interp.knockout`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from experiments.bench import Bench, Planned
from experiments.frame import Command
from experiments.given import TraceSettings
from experiments.options import Only, a_task, default
from experiments.settings import (
    CORRECTIONS,
    Correction,
    Questions,
    load_pair,
    load_questions,
)
from hooks.errors import FrankenlensError
from interp.decision import null_changes
from interp.knockout import (
    PAPER_ROUTES,
    ROUTES,
    Knockout,
    answered_traces,
    around,
    null_route_table,
    plot_flow,
    plot_routes,
    route_table,
    routes,
    singles,
    suffixes,
    windows,
    wrong,
)
from interp.metrics import AnswerLogProbability, TraceLogLikelihood
from interp.pair.pair import Pair
from interp.plan import decisions as plans
from interp.plan.prompts import up_to_the_answer
from interp.plan.routes import RoutesPlan
from interp.plan.work import Work
from interp.questions.examples import with_looked_at
from interp.questions.tasks import REASONING
from interp.results.page import Account, Section
from interp.statistics import interval_text

METRICS = {
    "answer": ("log-probability of the answer's first token", AnswerLogProbability()),
    "trace": ("log-likelihood of the trace up to the answer's first token", TraceLogLikelihood()),
}
PAPER_N, PAPER_WIDTH = 100, 9
TOLD = 3  # differences that the finding names
WIDE = {"windows": windows, "around": around}
"""Ways of cutting several layers at once."""


@dataclass(frozen=True)
class KnockoutConfig(TraceSettings):
    """Settings of the knockout; the defaults run on the pair that ships with the package.

    Attributes:
        routes: "source -> target" of image, question, template, reasoning, answer, before reasoning, or last (the
            token before the answer, which predicts its first word). By default those among image, question, reasoning
            and last; without those of the image where no question has one.
        layers: windows (every run of `width` layers), around (`width` layers around each, fewer at the ends),
            suffixes (every layer from k on) or singles.
        width: layers of a window.
        mass: of the edges that are cut: renormalized (masked before the softmax) or lost (zeroed after it).
        metric: answer (its first token) or trace (all of it, up to there).
        whose: whose traces both models read.
        right_only: leave traces out whose answer is wrong.
        relative: report the relative change of the probability in %, not the change of its logarithm in nats.
        nulls: beside the pair, models that learnt nothing (RL in bfloat16; IN with a random update of RL's norm).
        correction: of p values, over all routes and windows.
        paper: the definition of 2411.18620: its routes, 9 layers around each, relative change, right answers, n = 100
            a task. Its prompts hold no reasoning; here the answer's first token stands behind the trace.
        n: prompts to look at.
        out: folder for knockout.csv, knockout.nc, the figures and report.html.
    """

    n: int = default(96, paper=a_task(PAPER_N, REASONING))
    routes: tuple[str, ...] = default(tuple(ROUTES), paper=PAPER_ROUTES)
    layers: Literal["windows", "around", "suffixes", "singles"] = default("windows", paper="around")
    width: int = default(
        3, paper=PAPER_WIDTH, only=Only("--layers windows or around", lambda config: config.layers in WIDE)
    )
    mass: Literal["renormalized", "lost"] = default("renormalized", paper="renormalized")
    metric: Literal["answer", "trace"] = default("answer", paper="answer")
    whose: Literal["in", "rl"] = "rl"
    right_only: bool = default(False, paper=True)
    relative: bool = default(False, paper=True)
    nulls: bool = True
    correction: Correction = "holm"
    paper: bool = False
    out: Path = Path("out/knockout")


def check(config: KnockoutConfig) -> None:
    """Refuse routes and widths that there are not, and a relative change of what is no probability."""
    if not config.routes:
        raise FrankenlensError('--routes is empty; give at least one, such as "image -> question".')
    if config.width < 1:
        raise FrankenlensError(f"--width is {config.width}; give at least 1.")
    if config.relative and config.metric == "trace":
        raise FrankenlensError("--relative is the change of the answer's probability; give --metric answer.")
    for name in config.routes:
        parse_route(name)


def parse_route(name: str) -> Knockout:
    """`source -> target` as a knockout of all layers.

    Raises:
        FrankenlensError: it is none.
    """
    source, arrow, target = (part.strip() for part in name.partition("->"))
    if not arrow or not source or not target:
        raise FrankenlensError(f'--routes has {name!r}; write "source -> target", e.g. "image -> question".')
    names = {"last": "before answer"}
    return Knockout(names.get(source, source), names.get(target, target))


def measure(pair: Pair, asked: Questions, config: KnockoutConfig) -> Iterator[Section]:
    """Every route cut in both models.

    Raises:
        FrankenlensError: no trace has every route, or there are no such layers.
    """
    prompts, left_out = answered_traces(
        pair.models[config.whose],
        pair.builder,
        asked.examples,
        fault=wrong() if config.right_only else None,
        given=asked.traces.get(config.whose),
        **config.running,
    )
    if not prompts:
        reasons = "; ".join(f"{n}: {reason}" for reason, n in left_out.items())
        others = ", or --no-right-only" if config.right_only else ""
        raise FrankenlensError(
            f"None of {len(asked.examples)} traces of {config.whose.upper()} can be used ({reasons}). Give more "
            f"questions (--n), the other model's traces (--whose){others}, or what the models write (--reasoning, "
            "--answer, --max-new-tokens)."
        )
    chosen = _chosen(asked.in_words, config)
    if unseen := len(config.routes) - len(chosen):
        left_out["routes of the image: no question has one"] = unseen
    found = routes(
        pair,
        prompts,
        {name: _cuts(name, pair.in_.n_layers, config) for name in chosen},
        METRICS[config.metric][1],
        nulls=null_changes(pair, config.seed) if config.nulls else None,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    left_out.update(why for why in found["why"].to_numpy().tolist() if why)
    settings: dict = {"relative": config.relative, "correction": config.correction}
    table = route_table(found, **settings)
    tables = {"knockout": table}
    if config.nulls:
        tables["knockout_nulls"] = null_route_table(found, **settings)
    yield Section(
        "knockout",
        "Which information routes RL opened or closed",
        _finding(tables),
        _account(config, table, len(asked.examples), left_out),
        tables,
        {"knockout_routes": plot_routes(table), "knockout_flow": plot_flow(table)},
        with_looked_at(found, asked.examples),
    )


def _chosen(in_words: bool, config: KnockoutConfig) -> list[str]:
    """The routes that are cut: those that were asked for; of the default ones, those that the questions may have."""
    wanted = [" -> ".join(part.strip() for part in name.split("->")) for name in config.routes]
    if "routes" in config.given or not in_words:
        return wanted
    cuts = {name: parse_route(name) for name in wanted}
    return [name for name, cut in cuts.items() if "image" not in (cut.source, cut.target)]


def _cuts(name: str, n_layers: int, config: KnockoutConfig) -> list[Knockout]:
    """A route, cut in all the runs of layers that the settings name."""
    cut = replace(parse_route(name), mass=config.mass)
    if config.layers in WIDE:
        return WIDE[config.layers](cut, n_layers, config.width)
    return (suffixes if config.layers == "suffixes" else singles)(cut, n_layers)


def _account(
    config: KnockoutConfig, table: pd.DataFrame, n_examples: int, left_out: Mapping[str, int]
) -> Account:
    return Account(
        _definition(config),
        f"{int(table['n'].max())} traces of {config.whose.upper()}, the same in both models",
        f"{CORRECTIONS[config.correction]} over {len(table)} cuts",
        config.seed,
        left_out=left_out,
        counts={"examples": n_examples},
    )


def _definition(config: KnockoutConfig) -> str:
    width = f" of {config.width} layers" if config.layers in WIDE else ""
    what = METRICS[config.metric][0]
    what = "relative change of the probability of the answer's first token" if config.relative else what
    return (
        f"attention knockout, mass {config.mass}, {config.layers}{width}; {what}, cut less clean; "
        "control: as many random edges in the same layers (one draw; keys: at the same queries, edges: anywhere)"
    )


def _finding(tables: Mapping[str, pd.DataFrame]) -> str:
    table = tables["knockout"]
    units, said = table.attrs["units"], []
    rows: list[dict[str, Any]] = table.to_dict("records")
    for side, model in (("before", "IN"), ("after", "RL")):
        row = rows[int(table[side].to_numpy().argmin())]
        said.append(
            f"{model} needs {row['route']} in layers {row['window']} most: {_text(row, side)} {units} "
            f"(random {row['control_kind']}: {_text(row, f'{side}_control')}; n = {row['n']}; clean "
            f"{_text(row, f'{side}_clean')} nats)."
        )
    told = sorted((row for row in rows if row["p_corrected"] < 0.05), key=lambda row: -abs(row["difference"]))
    named = "; ".join(
        f"{row['route']}, layers {row['window']}: {_text(row, 'difference')} "
        f"(random {row['control_kind']}: {_text(row, 'control_difference')})"
        for row in told[:TOLD]
    )
    head = f"RL − IN differs (p corrected < 0.05) in {len(told)} of {len(rows)} cuts"
    said.append(f"{head}, most in {named}." if told else f"{head}.")
    if (nulls := tables.get("knockout_nulls")) is not None:
        counts = [
            f"{name} {int((some['p_corrected'] < 0.05).sum())} (largest {some['difference'].abs().max():.2g})"
            for name, some in nulls.groupby("null")
        ]
        said[-1] = f"{said[-1].removesuffix('.')}; models that learnt nothing differ in: {', '.join(counts)}."
    return " ".join(said)


def _text(row: Mapping[str, Any], name: str) -> str:
    return interval_text(row[name], row[f"{name}_low"], row[f"{name}_high"])


def work(bench: Bench, config: KnockoutConfig) -> Iterator[Work]:
    """What `measure` computes, counted and not run."""
    asked, runs = bench.workload, bench.runs()
    steps = [asked.trace_tokens] * len(asked.prompts)
    yield runs.written(f"greedy text of {config.whose.upper()}", asked.prompts, steps).times(asked.scale)
    read = [up_to_the_answer(prompt, asked.trace_tokens) for prompt in asked.prompts]
    names = _chosen(not any(prompt.has_image for prompt in read), config)
    cuts = {name: _cuts(name, bench.vlm.n_layers, config) for name in names}
    planned = RoutesPlan(bench.vlm, METRICS[config.metric][1].reads, cuts, config.batch_size, bench.at_tokens)
    one = planned.work(read, "routes cut in both models").times(asked.scale * asked.decided)
    yield one.times(2)
    if config.nulls:
        n = 1 + (bench.vlm.model.dtype != torch.bfloat16)
        yield plans.set_aside(replace(one.times(n), what="in models that learnt nothing"), runs)


def assumed(bench: Bench, config: KnockoutConfig) -> Iterator[str]:
    """What `work` takes for granted."""
    yield f"{bench.settings.decided:.0%} of the traces have an answer (--decided), of one word at their end"


COMMAND = Command(
    KnockoutConfig,
    check,
    load_questions,
    load_pair,
    measure,
    plan=Planned(work, assumed=assumed),
    on_ray=True,
)
