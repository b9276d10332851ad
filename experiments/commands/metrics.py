"""What does an answer owe to the image, to a description of it, to reasoning alone? M_vis, M_v2r and M_rea.

`frankenlens metrics` is the command; the pieces are in `interp.fine_grained`. Section 1 of 2602.12395.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from experiments.settings import DataSettings, PairSettings, load_examples, load_pair, publish, require_sound
from hooks.errors import FrankenlensError
from interp.fine_grained import (
    METRICS,
    PAPER,
    PAPER_N,
    TEMPLATE,
    ask,
    described_by_model,
    fine_grained_table,
    in_words,
    questions,
)
from interp.fine_grained.questions import APART
from interp.pair.pair import Pair
from interp.questions.examples import Example, with_looked_at
from interp.questions.tasks.description import describe_scene
from interp.results.page import Account, Section
from interp.statistics import adjust, bootstrap_difference, interval_text, mcnemar

SYNTHETIC = "{description} , {question}"
"""Description and question in the vocabulary of the embedded triple."""


@dataclass(frozen=True)
class MetricsConfig(PairSettings, DataSettings):
    """Settings of the fine-grained metrics; the defaults run on the triple that ships with the package.

    Attributes:
        n: questions; of each metric with --paper.
        metrics: of vis, v2r, rea.
        template: of a problem with its description.
        describe: data (the rows' descriptions; without them v2r is left out) or model (IN describes each image).
        paper: the paper's data (MathVista general-vqa for vis, MathVista math-targeted-vqa for v2r, MATH-500 for rea;
            they are downloaded), n = 100 for each metric; images are described by IN, as nobody else is asked.
        out: folder for metrics.csv, metrics.png, metrics.nc and report.html.
    """

    n: int = 100
    metrics: tuple[str, ...] = METRICS
    template: str | None = None
    describe: Literal["data", "model"] = "data"
    paper: bool = False
    out: Path = Path("out/metrics")


def run(config: MetricsConfig) -> pd.DataFrame:
    """Ask every model every variant of every question, and write table, figure, dataset and page, all or none.

    Returns:
        The table of metrics.csv.

    Raises:
        FrankenlensError: settings contradict each other, or the models or data cannot be read.
    """
    check(config)
    examples, dropped = load(config)
    pair = load_pair(config, with_base=True)
    try:
        section = measure(pair, examples, config, dropped)
        publish([section], config, config.out, pair.provenance(), {"examples": len(examples)})
    finally:
        pair.close()
    return section.tables["metrics"]


def check(config: MetricsConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    if config.paper and config.data is not None:
        raise FrankenlensError("--paper has its own data; leave out --data, or --paper.")
    unknown = [name for name in config.metrics if name not in METRICS]
    if unknown or not config.metrics:
        raise FrankenlensError(
            f"--metrics has {', '.join(unknown) or 'nothing'}; choose of {', '.join(METRICS)}."
        )


def load(config: MetricsConfig) -> tuple[list[Example], dict[str, int]]:
    """The questions; the synthetic ones with a description, and once more with it in place of the image.

    Raises:
        FrankenlensError: no row can be read.
    """
    if config.paper:
        examples: list[Example] = []
        dropped: Counter[str] = Counter()
        for metric in config.metrics:
            some, left = load_examples(replace(config, data=Path(PAPER[metric]), n=PAPER_N), config.seed)
            examples += [replace(example, task=metric) for example in some]
            dropped.update(left)
        return examples, dict(dropped)
    examples, left_out = load_examples(config, config.seed)
    if config.data is None:
        described = [
            replace(example, meta={**example.meta, "description": describe_scene(example)})
            for example in examples
        ]
        examples = [*described, *(in_words(example, SYNTHETIC) for example in described)]
    return examples, left_out


def measure(
    pair: Pair, examples: Sequence[Example], config: MetricsConfig, dropped: Mapping[str, int] | None = None
) -> Section:
    """The metrics of every model of a pair, on the same prompts, as a section of a page."""
    template = config.template or (SYNTHETIC if config.data is None and not config.paper else TEMPLATE)
    running: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    order = [name for name in ("base", "in", "rl") if name in pair.models]
    reasons = Counter(dropped or {})
    if config.describe == "model" or config.paper:
        examples = described_by_model(pair.in_, pair.builder, examples, **running)
    found, tables, changes = [], [], []
    for names, some in _groups(examples, config, reasons):
        asked = questions(pair.builder, some, template=template, metrics=names)
        answers = [ask(pair.models[name], asked, **running) for name in order]
        found.append(xr.concat(answers, pd.Index(order, name="model")))
        tables += [fine_grained_table(found[-1].sel(model=name)).assign(model=name) for name in order]
        changes.append(change_table(found[-1], config.seed))
        for name in order:
            why = found[-1]["left_out"].sel(model=name).to_numpy()
            missing = {(reason, row) for one in why.tolist() for row, reason in enumerate(one) if reason}
            reasons.update(f"{name.upper()}: {reason}" for reason, _ in missing if reason not in APART)
    table = pd.concat(tables, ignore_index=True).assign(
        correction="none: p is of a measure against its control"
    )
    table = table.loc[:, ["model", *(name for name in table if name != "model")]]
    change = pd.concat(changes, ignore_index=True)
    change = change.assign(p_corrected=adjust(change["p"].to_numpy(dtype=float)))
    words = "; rea: a description of the scene in words instead of the image" if config.data is None else ""
    account = Account(
        f"{'the paper: ' if config.paper else ''}vis = right with the image and wrong with a black one; v2r = right "
        "with the image and right with a black one and a description; rea = right without an image; greedy, Wilson's "
        f"intervals (95 %); RL − IN paired, McNemar's exact test{'' if config.paper else words}",
        f"{len(examples)} prompts, with an image or in words",
        "Holm over the metrics (RL − IN)",
        config.seed,
        left_out=dict(reasons),
    )
    figures = {"metrics": plot_metrics(table, order)}
    tables_out = {"metrics": table, "metrics_change": change}
    title = "What answers owe to image, description and reasoning"
    # the paper's metrics have questions of their own
    dataset = with_looked_at(found[0], examples) if len(found) == 1 else None
    return Section("metrics", title, finding(table, change), account, tables_out, figures, dataset)


def _groups(
    examples: Sequence[Example], config: MetricsConfig, reasons: Counter[str]
) -> list[tuple[tuple[str, ...], list[Example]]]:
    """Metrics and the questions that they are measured on: together, or each its own (the paper)."""
    if config.paper:
        own = ((name, [example for example in examples if example.task == name]) for name in config.metrics)
        return [((name,), some) for name, some in own if some]
    names = config.metrics
    bare = [example for example in examples if example.images and not example.meta.get("description")]
    if "v2r" in names and bare:
        reasons["v2r is left out: images without a description (--describe model lets IN describe them)"] += (
            len(bare)
        )
        names = tuple(name for name in names if name != "v2r")
    return [(names, list(examples))]


def change_table(found: xr.Dataset, seed: int = 0) -> pd.DataFrame:
    """RL − IN of every metric on the questions that both have.

    Columns: measure, change, low, high (paired bootstrap, 95 %), gained, lost, n, p (McNemar, exact, not corrected).
    """
    rows = []
    for metric in found["metric"].to_numpy().tolist():
        in_, rl = (found["value"].sel(model=name, metric=metric).to_numpy() for name in ("in", "rl"))
        test, change = mcnemar(rl, in_), bootstrap_difference(rl, in_, seed=seed)
        ends = {"change": change.value, "low": change.low, "high": change.high}
        counts = {"gained": test.gained, "lost": test.lost, "n": test.n, "p": test.p}
        rows.append({"measure": metric} | {name: float(end) for name, end in ends.items()} | counts)
    return pd.DataFrame(rows)


def finding(table: pd.DataFrame, changes: pd.DataFrame) -> str:
    """Each metric of each model with its interval, beside its control."""
    whole = table.loc[table["task"] == "all"] if (table["task"] == "all").any() else table
    sentences = []
    for change in changes.to_dict("records"):
        parts = []
        for row in whole.loc[whole["measure"] == change["measure"]].to_dict("records"):
            beside = "" if pd.isna(row["control"]) else f", control {row['control']:.2f}"
            text = interval_text(row["value"], row["low"], row["high"])
            parts.append(f"{row['model'].upper()} {text}{beside}")
        gain = interval_text(change["change"], change["low"], change["high"])
        test = f"RL − IN {gain}, n = {change['n']}, p = {change['p_corrected']:.2g} after correction"
        sentences.append(f"{change['measure']}: {'; '.join(parts)}; {test}.")
    return " ".join(sentences)


def plot_metrics(table: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Every metric of every model with its interval; grey: its control."""
    whole = table.loc[table["task"] == "all"] if (table["task"] == "all").any() else table
    names = [name for name in METRICS if name in set(whole["measure"])]
    figure = Figure(figsize=(1.6 + 1.7 * len(names), 2.8), layout="constrained")
    axis = figure.subplots()
    for k, model in enumerate(models):
        some = whole.loc[whole["model"] == model].set_index("measure").loc[names]
        x = np.arange(len(names)) + 0.22 * (k - (len(models) - 1) / 2)
        value, low, high = (some[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
        axis.errorbar(x, value, [value - low, high - value], fmt="o", capsize=2, label=model.upper())
        axis.plot(x, some["control"].to_numpy(dtype=float), "_", color="grey", ms=12, mew=2)
    axis.plot([], [], "_", color="grey", ms=12, mew=2, label="control")
    axis.set_xticks(range(len(names)), [f"$M_{{{name}}}$" for name in names])
    axis.set_ylabel("share of questions")
    axis.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
