"""Which information routes did RL open or close? Attention knockout between roles, by layers, in IN against RL.

`frankenlens knockout` is the command; the pieces are in `interp.knockout`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import xarray as xr

from experiments.settings import DataSettings, PairSettings, load_examples, load_pair, publish, require_sound
from hooks.errors import FrankenlensError
from interp.decision import null_changes
from interp.knockout import (
    PAPER_ROUTES,
    ROUTES,
    Knockout,
    around,
    plot_flow,
    plot_routes,
    route_table,
    routes,
    singles,
    suffixes,
    up_to_the_answer,
    windows,
)
from interp.localization.outcomes import Grader
from interp.metrics import AnswerLogProbability, TraceLogLikelihood
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.prompts import Prompt
from interp.questions.examples import Example, with_looked_at
from interp.questions.grading import Ungraded, grade
from interp.questions.tasks import REASONING
from interp.results.page import Account, Section
from interp.statistics import interval_text

METRICS = {
    "answer": ("log-probability of the answer's first token", AnswerLogProbability()),
    "trace": ("log-likelihood of the trace up to the answer's first token", TraceLogLikelihood()),
}
PAPER_N, PAPER_WIDTH = 100, 9
TOLD = 3  # differences that the finding names


@dataclass(frozen=True)
class KnockoutConfig(PairSettings, DataSettings):
    """Settings of the knockout; the defaults run on the pair that ships with the package.

    Attributes:
        routes: "source -> target" of image, question, template, reasoning, answer, before reasoning, or last (the
            token before the answer, which predicts its first word).
        layers: windows (every run of `width` layers), around (`width` layers around each, fewer at the ends),
            suffixes (every layer from k on) or singles.
        width: layers of a window.
        mass: of the edges that are cut: renormalized (masked before the softmax) or lost (zeroed after it).
        metric: answer (its first token) or trace (all of it, up to there).
        traces: whose greedy traces both models read.
        right_only: leave traces out whose answer is wrong.
        relative: report the relative change of the probability in %, not the change of its logarithm in nats.
        nulls: beside the pair, models that learnt nothing (RL in bfloat16; IN with a random update of RL's norm).
        correction: of p values, over all routes and windows.
        paper: the definition of 2411.18620: its routes, 9 layers around each, relative change, right answers, n = 100
            a task. Its prompts hold no reasoning; here the answer's first token stands behind the trace.
        n: prompts to look at.
        out: folder for knockout.csv, knockout.nc, the figures and report.html.
    """

    n: int = 96
    routes: tuple[str, ...] = tuple(ROUTES)
    layers: Literal["windows", "around", "suffixes", "singles"] = "windows"
    width: int = 3
    mass: Literal["renormalized", "lost"] = "renormalized"
    metric: Literal["answer", "trace"] = "answer"
    traces: Literal["in", "rl"] = "rl"
    right_only: bool = False
    relative: bool = False
    nulls: bool = True
    correction: Literal["holm", "bh"] = "holm"
    paper: bool = False
    out: Path = Path("out/knockout")


def run(config: KnockoutConfig) -> pd.DataFrame:
    """Cut every route in both models and write tables, dataset, figures and page, all or none.

    Returns:
        The table of knockout.csv: see `interp.knockout.route_table`.

    Raises:
        FrankenlensError: settings contradict each other, the models are no pair, the data cannot be read, or no trace
            has every route.
    """
    config = settled(config)
    check(config)
    pair = load_pair(config)
    try:
        examples, dropped = load_examples(config, config.seed)
        section = measure(pair, examples, config, dropped)
        publish([section], config, config.out, pair.provenance(), {"examples": len(examples)})
    finally:
        pair.close()
    return section.tables["knockout"]


def settled(config: KnockoutConfig) -> KnockoutConfig:
    """The settings with `paper` spelt out."""
    if not config.paper:
        return config
    n = PAPER_N * len(REASONING) if config.data is None else PAPER_N
    own: dict = {"layers": "around", "width": PAPER_WIDTH, "relative": True, "right_only": True}
    return replace(config, routes=PAPER_ROUTES, n=n, metric="answer", mass="renormalized", **own)


def check(config: KnockoutConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
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


def measure(
    pair: Pair,
    examples: Sequence[Example],
    config: KnockoutConfig,
    dropped: Mapping[str, int] | None = None,
    grader: Grader = grade,
) -> Section:
    """All routes of a pair, as a section of a page.

    Args:
        pair: IN and RL.
        examples: what is asked.
        config: the settings.
        dropped: reason to number of examples that could not be read.
        grader: for `right_only`.

    Raises:
        FrankenlensError: see `run`.
    """
    prompts, left_out = _prompts(pair, examples, config, grader)
    if not prompts:
        reasons = "; ".join(f"{n}: {reason}" for reason, n in left_out.items())
        raise FrankenlensError(
            f"None of {len(examples)} traces of {config.traces.upper()} can be used ({reasons})."
        )
    cuts = {
        name: _in_layers(replace(parse_route(name), mass=config.mass), pair.in_.n_layers, config)
        for name in config.routes
    }
    found = routes(
        pair,
        prompts,
        cuts,
        METRICS[config.metric][1],
        nulls=null_changes(pair, config.seed) if config.nulls else None,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    left_out.update(why for why in found["why"].to_numpy().tolist() if why)
    settings: dict = {"relative": config.relative, "correction": config.correction, "seed": config.seed}
    table = route_table(found, **settings)
    tables = {"knockout": table}
    if config.nulls:
        tables["knockout_nulls"] = _nulls(found, settings)
    account = Account(
        _definition(config),
        f"{int(table['n'].max())} traces of {config.traces.upper()}, the same in both models",
        f"{config.correction.capitalize()} over {len(table)} cuts",
        config.seed,
        left_out=dict(left_out) | dict(dropped or {}),
    )
    figures = {"knockout_routes": plot_routes(table), "knockout_flow": plot_flow(table)}
    title = "Which information routes RL opened or closed"
    return Section(
        "knockout", title, _finding(tables), account, tables, figures, with_looked_at(found, examples)
    )


def _prompts(
    pair: Pair, examples: Sequence[Example], config: KnockoutConfig, grader: Grader
) -> tuple[list[Prompt], Counter[str]]:
    """Traces up to the answer's first token, and reason -> number of those that are left out."""
    asked = [pair.builder.build(example) for example in examples]
    writer = pair.models[config.traces]
    written = greedy(writer, asked, config.max_new_tokens, config.batch_size, progress=True)
    kept: list[Prompt] = []
    left_out: Counter[str] = Counter()
    for prompt, ids in zip(asked, written, strict=True):
        whole = prompt.with_tokens(ids)
        cut, why = up_to_the_answer(whole)
        if cut is not None and config.right_only:
            why = _wrong(whole, grader)
        if cut is None or why:
            left_out[why] += 1
        else:
            kept.append(cut)
    return kept, left_out


def _wrong(trace: Prompt, grader: Grader) -> str:
    try:
        return "" if grader(trace.trace.answer, trace.example) else "the answer is wrong"
    except Ungraded as error:
        return f"the answer cannot be graded: {error}"


def _in_layers(cut: Knockout, n_layers: int, config: KnockoutConfig) -> list[Knockout]:
    if config.layers == "suffixes":
        return suffixes(cut, n_layers)
    if config.layers == "singles":
        return singles(cut, n_layers)
    return (windows if config.layers == "windows" else around)(cut, n_layers, config.width)


def _definition(config: KnockoutConfig) -> str:
    width = f" of {config.width} layers" if config.layers in ("windows", "around") else ""
    what = METRICS[config.metric][0]
    what = "relative change of the probability of the answer's first token" if config.relative else what
    return (
        f"attention knockout, mass {config.mass}, {config.layers}{width}; {what}, cut less clean; "
        "control: as many random edges in the same layers (one draw; keys: at the same queries, edges: anywhere)"
    )


def _nulls(found: xr.Dataset, settings: dict) -> pd.DataFrame:
    """The same differences for models that learnt nothing, each against the model that it was made of."""
    made_of = {"bf16": "rl", "random": "in"}
    names = [name for name in found["model"].to_numpy().tolist() if name in made_of]
    parts = [route_table(found, models=(made_of[name], name), **settings) for name in names]
    named = [part.assign(null=name) for name, part in zip(names, parts, strict=True)]
    return pd.concat(named, ignore_index=True)


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
        said.append(f"Models that learnt nothing differ in: {', '.join(counts)}.")
    return " ".join(said)


def _text(row: Mapping[str, Any], name: str) -> str:
    return interval_text(row[name], row[f"{name}_low"], row[f"{name}_high"])
