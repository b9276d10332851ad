"""Do RL's reasoning tokens look at the image more than IN's? The attention shift, section 2 of 2602.12395.

`frankenlens attention` is the command; the pieces are in `interp.attention`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import xarray as xr

from experiments.bench import Bench, Planned
from experiments.frame import Command, kept
from experiments.given import TraceSettings
from experiments.options import a_task, default, require_known
from experiments.settings import (
    CORRECTIONS,
    Correction,
    NoImages,
    Questions,
    load_pair,
    load_questions,
)
from hooks.errors import FrankenlensError
from interp.attention import attention_shift, plot_head_shift, plot_shift, shifts
from interp.attention.plots import TITLES
from interp.attention.shift import PAIR, TRACES
from interp.decision import null_changes
from interp.pair.pair import Pair
from interp.plan import decisions as plans
from interp.plan.work import Work
from interp.prompts.roles import ROLES
from interp.questions.examples import with_looked_at
from interp.questions.tasks import REASONING
from interp.regions import Partition, parse_partition
from interp.results.page import Account, Section
from interp.statistics import interval_text

PAPER_N = 100  # questions a task


@dataclass(frozen=True)
class AttentionConfig(TraceSettings):
    """Settings of the attention shift; the defaults run on the pair that ships with the package.

    Attributes:
        n: questions; in equal shares over the synthetic reasoning tasks where no data is given.
        queries: role of the tokens that look.
        keys: role of the tokens that are looked at.
        measure: of the figures and the heads: mass (what a query gives to all keys together) or mean (to one of them);
            attention.csv has both.
        nulls: models that learnt nothing beside the pair, on the same traces (their weights are held a second time).
        correction: of p values, over the layers (or heads) of one comparison.
        partition: of the decoder, for the figure: paper, code, or sizes such as 8/12/8.
        paper: the paper's definition: the mass, as its figure shows it (its formula divides by the number of visual
            tokens), on each model's own traces; n = 100 a task.
        out: folder for attention.csv, attention_heads.csv, the figures, attention.nc and report.html.
    """

    n: int = default(120, paper=a_task(PAPER_N, REASONING))
    queries: str = default("reasoning", paper="reasoning")
    keys: str = default("image", paper="image")
    measure: Literal["mass", "mean"] = default("mass", paper="mass")
    nulls: bool = True
    correction: Correction = "holm"
    partition: str = default("paper", paper="paper")
    paper: bool = False
    out: Path = Path("out/attention")


def check(config: AttentionConfig) -> None:
    """Refuse roles that there are not."""
    require_known("queries", [config.queries], ROLES)
    require_known("keys", [config.keys], ROLES)


def load(config: AttentionConfig) -> Questions:
    """The questions.

    Raises:
        FrankenlensError: no row can be read, or none has an image for tokens to look at.
    """
    asked = load_questions(config)
    if asked.in_words and "image" in (config.keys, config.queries):
        raise NoImages(
            "No question has an image, so no token looks at one. Give other tokens to look at: --keys question."
        )
    return asked


def measure(pair: Pair, asked: Questions, config: AttentionConfig) -> Iterator[Section]:
    """The attention shift of a pair.

    Raises:
        FrankenlensError: the partition does not cover the model, or no trace can be used.
    """
    partition = parse_partition(config.partition, pair.in_.n_layers)
    found = attention_shift(
        pair,
        asked.examples,
        target=config.queries,
        source=config.keys,
        nulls=null_changes(pair, config.seed) if config.nulls else None,
        keep=kept(pair, asked.examples, config),
        traces=asked.traces,
        **config.running,
    )
    _require_traces(found)
    settings: dict[str, Any] = {"correction": config.correction}
    both = [shifts(found, per="layer", measure=name, **settings) for name in ("mass", "mean")]
    layers = pd.concat(both, ignore_index=True)
    heads = shifts(found, per="head", measure=config.measure, **settings)
    own = layers.loc[layers["measure"] == config.measure]
    yield Section(
        "attention",
        f"Attention from {config.queries} to {config.keys} tokens",
        " ".join(finding(own, heads, name, partition) for name in TRACES),
        _account(config, found, partition),
        {"attention": layers, "attention_heads": heads},
        {
            "attention": plot_shift(layers, partition, config.measure, config.keys),
            "attention_heads": plot_head_shift(heads, config.keys),
        },
        with_looked_at(found, asked.examples),
    )


def _require_traces(found: xr.Dataset) -> None:
    if not (found["why"] == "").any():
        reasons = Counter(found["why"].to_numpy().ravel().tolist()).most_common(3)
        told = "; ".join(f"{count}: {reason}" for reason, count in reasons)
        raise FrankenlensError(
            f"None of {2 * found.sizes['example']} traces can be used ({told}). Give the delimiters that the pair "
            "writes (--reasoning, --answer), longer traces (--max-new-tokens), or other --queries."
        )


def finding(layers: pd.DataFrame, heads: pd.DataFrame, traces: str, partition: Partition) -> str:
    """The largest shift on one choice of traces, how many layers and heads shift, and the same of the nulls."""
    where = TITLES[traces][0].upper() + TITLES[traces][1:]
    own = layers.loc[(layers["traces"] == traces) & (layers["comparison"] == PAIR)]
    if not own["n"].max():
        return f"{where}: no question with a usable trace of both."
    best = own.loc[own["difference"].abs().idxmax()]
    region = next(name for name, (first, last) in partition.regions.items() if first <= best["layer"] <= last)
    text = (
        f"{where} (n = {best['n']}): {PAIR} is largest in layer {best['layer']} ({region}), "
        f"{interval_text(best['difference'], best['low'], best['high'])} (IN {best['before']:.3g}); "
        f"{_told(own)} of {len(own)} layers and "
    )
    some = heads.loc[(heads["traces"] == traces) & (heads["comparison"] == PAIR)]
    text += f"{_told(some)} of {len(some)} heads differ after correction"
    for name in dict.fromkeys(layers["comparison"]):
        null = layers.loc[(layers["traces"] == traces) & (layers["comparison"] == name)]
        if name != PAIR and len(null):
            row = null.loc[null["difference"].abs().idxmax()]
            ends = f"{row['difference']:.2g} [{row['low']:.2g}, {row['high']:.2g}]".replace("-", "−")
            text += f"; {name}: at most {ends}, {_told(null)} of {len(null)} layers"
    return text + "."


def _told(table: pd.DataFrame) -> str:
    up = int(((table["p_corrected"] < 0.05) & (table["difference"] > 0)).sum())
    down = int(((table["p_corrected"] < 0.05) & (table["difference"] < 0)).sum())
    return f"{up} up and {down} down"


def _account(config: AttentionConfig, found: xr.Dataset, partition: Partition) -> Account:
    what = {"mass": "to all of them together (mass)", "mean": "to one of them on average (mean)"}
    definition = (
        f"{'the paper: ' if config.paper else ''}attention of a {config.queries} token {what[config.measure]} of the "
        f"{config.keys} tokens, mean over tokens, then over questions (layers: and over heads); delimiters are no "
        f"{config.queries} tokens; intervals over questions (95 %; those about one image are one), "
        "difference paired, p of a mean of 0"
    )
    left_out: Counter[str] = Counter()
    for row, name in enumerate(found["trace"].to_numpy().tolist()):
        reasons = (reason for reason in found["why"].to_numpy()[row].tolist() if reason)
        left_out.update(f"{name.upper()}'s traces: {reason}" for reason in reasons)
    each = "the layers, or the heads, of each comparison and choice of traces"
    correction = f"{CORRECTIONS[config.correction]} over {each}"
    n = found.sizes["example"]
    about = {"partition": str(partition), "left_out": dict(left_out), "counts": {"examples": n}}
    return Account(definition, f"{n} questions", correction, config.seed, **about)


def work(bench: Bench, config: AttentionConfig) -> Iterator[Work]:
    """What `attention_shift` computes, counted and not run."""
    asked, runs = bench.workload, bench.runs()
    steps = [asked.trace_tokens] * len(asked.prompts)
    for name in ("IN", "RL"):
        written = bench.runs(2 * config.batch_size).written(f"greedy text of {name}", asked.prompts, steps)
        yield written.times(asked.scale)
    once = runs.looked_at("both models along both texts", asked.traces, config.queries)
    yield once.times(4 * asked.scale)
    if config.nulls:
        n = 1 + (bench.vlm.model.dtype != torch.bfloat16)
        nulls = replace(once, what="pairs that learnt nothing").times(2 * n * asked.scale)
        yield plans.set_aside(nulls, runs)


COMMAND = Command(AttentionConfig, check, load, load_pair, measure, plan=Planned(work))
