"""Do RL's reasoning tokens look at the image more than IN's? The attention shift, section 2 of 2602.12395.

`frankenlens attention` is the command; the pieces are in `interp.attention.shift`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import xarray as xr

from experiments.settings import DataSettings, PairSettings, load_examples, load_pair, publish, require_sound
from hooks.errors import FrankenlensError, nearest
from interp.attention.plots import PAIR, TITLES, plot_head_shift, plot_shift
from interp.attention.shift import TRACES, attention_shift, shift
from interp.decision import null_changes
from interp.pair.pair import Pair
from interp.prompts.roles import ROLES
from interp.questions.examples import Example, with_looked_at
from interp.questions.tasks import REASONING
from interp.regions import Partition, parse_partition
from interp.results.page import Account, Section
from interp.statistics import interval_text

PAPER_N = 100  # questions a task
_NULLS = {
    "bf16": ("rl", "RL rounded to bfloat16 − RL"),
    "random": ("in", "IN with a random update of RL's norm − IN"),
}


@dataclass(frozen=True)
class AttentionConfig(PairSettings, DataSettings):
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

    n: int = 120
    queries: str = "reasoning"
    keys: str = "image"
    measure: Literal["mass", "mean"] = "mass"
    nulls: bool = True
    correction: Literal["holm", "bh"] = "holm"
    partition: str = "paper"
    paper: bool = False
    out: Path = Path("out/attention")


def run(config: AttentionConfig) -> Section:
    """Measure, and write tables, figures, dataset and page, all or none.

    Returns:
        The section of the page, with all tables.

    Raises:
        FrankenlensError: settings contradict each other, the models are no pair, the data cannot be read, or no trace
            can be used.
    """
    config = settled(config)
    check(config)
    examples, dropped = load_examples(config, config.seed)
    pair = load_pair(config)
    try:
        section = measure(pair, examples, config, dropped)
        publish([section], config, config.out, pair.provenance(), {"examples": len(examples)})
    finally:
        pair.close()
    return section


def settled(config: AttentionConfig) -> AttentionConfig:
    """The settings with `paper` spelt out."""
    if not config.paper:
        return config
    n = PAPER_N * len(REASONING) if config.data is None else PAPER_N
    return replace(config, n=n, measure="mass", queries="reasoning", keys="image", partition="paper")


def check(config: AttentionConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    for option in ("queries", "keys"):
        role = getattr(config, option)
        if role not in ROLES:
            hint = nearest(role, ROLES)
            raise FrankenlensError(
                f"--{option} has {role!r}; choose one of {', '.join(ROLES)}. {hint}".strip()
            )


def measure(
    pair: Pair,
    examples: Sequence[Example],
    config: AttentionConfig,
    dropped: Mapping[str, int] | None = None,
) -> Section:
    """The attention shift of a pair, as a section of a page.

    Args:
        pair: IN and RL; as they were, afterwards.
        examples: what is asked.
        config: the settings.
        dropped: reason to number of examples that could not be read.

    Raises:
        FrankenlensError: the partition does not cover the model, or no trace can be used.
    """
    config = settled(config)
    partition = parse_partition(config.partition, pair.in_.n_layers)
    found = attention_shift(
        pair,
        examples,
        target=config.queries,
        source=config.keys,
        nulls=null_changes(pair, config.seed) if config.nulls else None,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    if not (found["why"] == "").any():
        reasons = Counter(found["why"].to_numpy().ravel().tolist()).most_common(3)
        told = "; ".join(f"{count}: {reason}" for reason, count in reasons)
        raise FrankenlensError(
            f"None of {2 * len(examples)} traces can be used ({told}). Give the delimiters that the pair writes "
            "(--reasoning, --answer), longer traces (--max-new-tokens), or other --queries."
        )
    layers = pd.concat([shifts(found, config, "layer", name) for name in ("mass", "mean")], ignore_index=True)
    heads = shifts(found, config, "head", config.measure)
    figures = {
        "attention": plot_shift(layers, partition, config.measure),
        "attention_heads": plot_head_shift(heads),
    }
    own = layers.loc[layers["measure"] == config.measure]
    return Section(
        "attention",
        f"Attention from {config.queries} to {config.keys} tokens",
        " ".join(finding(own, heads, name, partition) for name in TRACES),
        _account(config, found, partition, dropped or {}),
        {"attention": layers, "attention_heads": heads},
        figures,
        with_looked_at(found, examples),
    )


def shifts(found: xr.Dataset, config: AttentionConfig, per: str, quantity: str) -> pd.DataFrame:
    """RL − IN on all choices of traces, and each model that learnt nothing against the one it was made from."""
    settings = {"per": per, "measure": quantity, "correction": config.correction, "seed": config.seed}
    tables = [
        shift(found, traces, **settings).assign(traces=traces, comparison=PAIR, measure=quantity)
        for traces in TRACES
    ]
    for name, (origin, label) in _NULLS.items():
        if name in found["model"].to_numpy():
            for traces in ("in", "rl"):
                null = shift(found, traces, models=(origin, name), **settings)
                tables.append(null.assign(traces=traces, comparison=label, measure=quantity))
    table = pd.concat(tables, ignore_index=True)
    front = ["traces", "comparison", "measure"]
    return table.loc[:, [*front, *(name for name in table if name not in front)]]


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


def _account(
    config: AttentionConfig, found: xr.Dataset, partition: Partition, dropped: Mapping[str, int]
) -> Account:
    what = {"mass": "to all of them together (mass)", "mean": "to one of them on average (mean)"}
    definition = (
        f"{'the paper: ' if config.paper else ''}attention of a {config.queries} token {what[config.measure]} of the "
        f"{config.keys} tokens, mean over tokens, then over questions (layers: and over heads); delimiters are no "
        f"{config.queries} tokens; bootstrap over questions (95 %), difference paired, p by sign flips"
    )
    left_out = Counter(dropped)
    for row, name in enumerate(found["trace"].to_numpy().tolist()):
        reasons = (reason for reason in found["why"].to_numpy()[row].tolist() if reason)
        left_out.update(f"{name.upper()}'s traces: {reason}" for reason in reasons)
    name = {"holm": "Holm", "bh": "Benjamini-Hochberg"}[config.correction]
    correction = f"{name} over the layers, or the heads, of each comparison and choice of traces"
    n = f"{found.sizes['example']} questions"
    return Account(definition, n, correction, config.seed, str(partition), dict(left_out))
