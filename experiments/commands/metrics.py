"""What does an answer owe to the image, to a description of it, to reasoning alone? M_vis, M_v2r and M_rea.

`frankenlens metrics` is the command; the pieces are in `interp.fine_grained`. Section 1 of 2602.12395.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import xarray as xr

from experiments.bench import Bench, Planned
from experiments.frame import Command, kept
from experiments.options import Only, default, require_known
from experiments.papers import ASKED, PaperSettings, described, paper_questions, refuse_own_data
from experiments.settings import Questions, checkpoints, load_questions, load_triple
from hooks.errors import FrankenlensError
from interp.fine_grained import (
    METRICS,
    PAPER_N,
    TEMPLATE,
    ask,
    change_table,
    described_by_model,
    fine_grained_table,
    in_words,
    plot_metrics,
    questions,
)
from interp.fine_grained.paper import DESCRIBED
from interp.fine_grained.questions import APART, NEEDS
from interp.pair.pair import Pair
from interp.plan.prompts import variants_of
from interp.plan.work import Work
from interp.prompts import Prompt
from interp.questions.examples import Example, with_looked_at
from interp.questions.tasks.description import describe_scene
from interp.results.page import Account, Section
from interp.results.store import under
from interp.statistics import adjust, interval_text

SYNTHETIC = "{description} , {question}"
"""Description and question in the vocabulary of the embedded triple."""
_OF_V2R = Only("v2r among --metrics", lambda config: "v2r" in config.metrics)


@dataclass(frozen=True)
class MetricsConfig(PaperSettings):
    """Settings of the fine-grained metrics; the defaults run on the triple that ships with the package.

    Attributes:
        n: questions; of each metric with --paper.
        metrics: of vis, v2r, rea.
        described: how a problem and its description are put together, with {description} and {question}.
        describe: data (the rows' descriptions; without them v2r is left out) or model (IN describes each image).
        paper: the paper's data (MathVista general-vqa for vis, MathVista math-targeted-vqa for v2r, MATH-500 for rea;
            downloaded, or of --copies), its sample of 100 for each metric, its prompts, system message and longest
            reply; images are described by IN, as nobody else is asked.
        out: folder for metrics.csv, metrics.png, metrics.nc and report.html.
    """

    n: int = default(100, paper=PAPER_N)
    metrics: tuple[str, ...] = METRICS
    described: str | None = default(None, paper=DESCRIBED, only=_OF_V2R)
    describe: Literal["data", "model"] = default("data", paper="model", only=_OF_V2R)
    out: Path = Path("out/metrics")


OF_IMAGES = ("vis", "v2r")
"""Metrics of answers with an image and without."""


def check(config: MetricsConfig) -> None:
    """Refuse metrics that there are not, and data beside the paper's."""
    refuse_own_data(config)
    require_known("metrics", config.metrics, METRICS)
    if not config.metrics:
        raise FrankenlensError(f"--metrics is empty; choose of {', '.join(METRICS)}.")


def load(config: MetricsConfig) -> Questions:
    """The questions; the synthetic ones with a description, and once more with it in place of the image.

    Raises:
        Unreachable: the paper's data cannot be had.
        FrankenlensError: no row can be read.
    """
    if config.paper:
        return paper_questions(config, config.seed, config.metrics)
    asked = load_questions(config)
    if config.data is not None:
        return asked
    described = [
        replace(example, meta={**example.meta, "description": describe_scene(example)})
        for example in asked.examples
    ]
    return replace(asked, examples=[*described, *(in_words(example, SYNTHETIC) for example in described)])


def measure(pair: Pair, asked: Questions, config: MetricsConfig) -> Iterator[Section]:
    """The metrics of every model of a pair, on the same prompts."""
    template = config.described or (SYNTHETIC if config.data is None and not config.paper else TEMPLATE)
    order = [name for name in ("base", "in", "rl") if name in pair.models]
    left_out: Counter[str] = Counter()
    examples = asked.examples
    keep = kept(pair, examples, config)
    told = under(keep, "described")
    if config.paper:
        examples = described(pair, examples, keep=told, **config.running)
    elif config.describe == "model":
        builder = pair.builder.with_instruction("")
        examples = described_by_model(pair.in_, builder, examples, keep=told, **config.running)
    found: list[xr.Dataset] = []
    for number, (names, some) in enumerate(_groups(examples, config, left_out)):
        ready = questions(pair.builder, some, template=template, metrics=names)
        answers = [
            ask(pair.models[name], ready, keep=under(keep, f"{number}-{name}"), **config.running)
            for name in order
        ]
        found.append(xr.concat(answers, pd.Index(order, name="model")))
        left_out.update(_missing(found[-1]))
    table = _shares(found)
    change = pd.concat([change_table(one) for one in found], ignore_index=True)
    change["p_corrected"] = adjust(change["p"].to_numpy(dtype=float))
    said = finding(table, change)
    yield Section(
        "metrics",
        "What answers owe to image, description and reasoning",
        said[0],
        _account(config, len(examples), left_out),
        {"metrics": table, "metrics_change": change},
        {"metrics": plot_metrics(table, order)},
        # the paper's metrics have questions of their own
        with_looked_at(found[0], examples) if len(found) == 1 else None,
        details=said[1],
    )


def _groups(
    examples: Sequence[Example], config: MetricsConfig, left_out: Counter[str]
) -> list[tuple[tuple[str, ...], list[Example]]]:
    """Metrics and the questions that they are measured on: together, or each its own (the paper)."""
    if config.paper:
        own = ((name, [example for example in examples if example.task == name]) for name in config.metrics)
        return [((name,), some) for name, some in own if some]
    names = config.metrics
    if not any(example.images for example in examples):
        unseen = [name for name in names if name in OF_IMAGES]
        if len(unseen) == len(names):
            raise FrankenlensError(
                f"No question has an image, and {', '.join(names)} compare answers with and without one: --metrics rea."
            )
        names = tuple(name for name in names if name not in OF_IMAGES)
        if unseen:
            left_out[f"{' and '.join(unseen)}: no question has an image"] = len(unseen)
    bare = [example for example in examples if example.images and not example.meta.get("description")]
    if "v2r" in names and bare:
        reason = "v2r is left out: images without a description (--describe model lets IN describe them)"
        left_out[reason] += len(bare)
        names = tuple(name for name in names if name != "v2r")
    return [(names, list(examples))]


def _missing(found: xr.Dataset) -> Iterator[str]:
    """Per model and example why it has no value, once each."""
    for name in found["model"].to_numpy().tolist():
        why = found["left_out"].sel(model=name).to_numpy().tolist()
        missing = {(reason, row) for one in why for row, reason in enumerate(one) if reason}
        yield from (f"{name.upper()}: {reason}" for reason, _ in missing if reason not in APART)


def _shares(found: Sequence[xr.Dataset]) -> pd.DataFrame:
    """Every model's metrics, one below the other."""
    tables = [
        fine_grained_table(one.sel(model=name)).assign(model=name)
        for one in found
        for name in one["model"].to_numpy().tolist()
    ]
    table = pd.concat(tables, ignore_index=True)
    table = table.assign(correction="none: p is of a measure against its control")
    return table.loc[:, ["model", *(name for name in table if name != "model")]]


_IN_WORDS = {
    "vis": "Right with the image and wrong with a black one (M_vis)",
    "v2r": "Right with the image, and with a description of it (M_v2r)",
    "rea": "Right on text alone (M_rea)",
}


def finding(table: pd.DataFrame, changes: pd.DataFrame) -> tuple[str, str]:
    """A sentence for each metric: IN and RL with intervals and controls, and their paired difference; Base apart."""
    whole = table.loc[table["task"] == "all"] if (table["task"] == "all").any() else table
    sentences, others = [], []
    for change in changes.to_dict("records"):
        parts = []
        for row in whole.loc[whole["measure"] == change["measure"]].to_dict("records"):
            beside = "" if pd.isna(row["control"]) else f", control {row['control']:.2f}"
            text = interval_text(row["value"], row["low"], row["high"])
            into = others if row["model"] == "base" else parts
            into.append(
                f"{'' if into is parts else change['measure'] + ' '}{row['model'].upper()} {text}{beside}"
            )
        gain = interval_text(change["change"], change["low"], change["high"])
        test = f"RL − IN {gain}, n = {change['n']}, p = {change['p_corrected']:.2g} after correction"
        sentences.append(f"{_IN_WORDS[change['measure']]}: {'; '.join(parts)}; {test}.")
    return " ".join(sentences), f"Before IN: {'; '.join(others)}." if others else ""


def _account(config: MetricsConfig, n: int, left_out: Counter[str]) -> Account:
    words = "; rea: a description of the scene in words instead of the image" if config.data is None else ""
    return Account(
        f"{'the paper: ' if config.paper else ''}vis = right with the image and wrong with a black one; v2r = right "
        "with the image and right with a black one and a description; rea = right without an image; greedy, Wilson's "
        f"intervals (95 %); RL − IN paired, McNemar's exact test{f'; {ASKED}' if config.paper else words}",
        f"{n} prompts, with an image or in words",
        "Holm over the metrics (RL − IN)",
        config.seed,
        left_out=left_out,
        counts={"examples": n},
    )


def work(bench: Bench, config: MetricsConfig) -> Iterator[Work]:
    """What `ask` computes for each model, counted and not run."""
    runs, tokens = bench.runs(), bench.trace_tokens
    names = ["IN", "RL", *(["Base"] if checkpoints(config)[2] else [])]
    if _by_model(config):
        told = runs.written("descriptions by IN", bench.prompts, [tokens] * len(bench.prompts))
        yield told.times(bench.scale)
    for variant, own in _variants(bench, config):
        written = runs.written(f"replies: {variant}", own, [tokens] * len(own))
        scale = config.n / len(own) if config.paper else bench.scale
        yield written.times(scale * len(names))


def _by_model(config: MetricsConfig) -> bool:
    return config.paper or config.describe == "model"


def _variants(bench: Bench, config: MetricsConfig) -> Iterator[tuple[str, list[Prompt]]]:
    """What is asked: the prompts themselves, or, where nobody knows yet how long they are, such as may be."""
    if not _by_model(config) and bench.examples:
        template = config.described or (SYNTHETIC if config.data is None else TEMPLATE)
        for metrics, some in _groups(bench.examples, config, Counter()):
            made = questions(bench.builder, some, template=template, metrics=metrics).prompts
            yield from ((variant, list(own.values())) for variant, own in made.items())
        return
    own = variants_of(bench.prompts, _described(bench, config), config.data is None and not config.paper)
    asked = [variant for metric in config.metrics for variant in NEEDS[metric]]
    for variant in (
        asked if config.paper else dict.fromkeys(asked)
    ):  # the paper's metrics have their own questions
        if own[variant]:
            yield variant, own[variant]


def _described(bench: Bench, config: MetricsConfig) -> int:
    """Tokens of a description: as a model writes it; of the data, as many as a question's."""
    if _by_model(config):
        return bench.trace_tokens
    return max(prompt.roles.count("question") for prompt in bench.prompts)


def assumed(bench: Bench, config: MetricsConfig) -> Iterator[str]:
    """What `work` takes for granted."""
    if _by_model(config) or not bench.examples:
        yield f"descriptions of {_described(bench, config)} tokens; black images as large as the others"


COMMAND = Command(
    MetricsConfig,
    check,
    load,
    load_triple,
    measure,
    plan=Planned(work, base=True, assumed=assumed),
    on_ray=True,
)
