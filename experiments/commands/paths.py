"""By which paths do RL's components act on the decision: straight on the logits, or through later heads and MLPs?

`frankenlens paths` is the command; the pieces are in `interp.paths`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

from experiments.settings import DataSettings, PairSettings, load_examples, load_pair, publish, require_sound
from hooks.errors import FrankenlensError
from interp.decision import Choice, DecisionSet, find_decisions, null_pair_denominator, recovery_refused
from interp.map.attribution import attribute
from interp.map.component_map import DIRECTIONS
from interp.pair.pair import Pair
from interp.paths import Receiver, paths_between
from interp.paths.pair import pair_paths, path_table, sender_table
from interp.paths.path import Between, parse_sender
from interp.paths.plots import plot_path_graph, plot_path_map
from interp.questions.examples import Example
from interp.results.files import load_dataset
from interp.results.page import Account, Section
from interp.statistics import Interval, interval_text

WORDS = {"rl_to_in": "RL into IN", "in_to_rl": "IN into RL"}


@dataclass(frozen=True)
class PathsConfig(PairSettings, DataSettings):
    """Settings of path patching; the defaults run on the pair that ships with the package.

    Attributes:
        senders: components by address, ranges included, e.g. blocks.4.mlp blocks.5.attn.head.1; where none is named,
            the strongest heads and MLPs of --map, or by attribution patching on the same prompts.
        top: how many of the strongest.
        map: map.nc of `frankenlens map`, to take the strongest from.
        receivers: e.g. blocks.7.attn.head.0.q blocks.7.attn.kv_head.0.v blocks.5.mlp logits; by default all of them.
        direction: rl_to_in (RL's value of the sender into IN), in_to_rl or both.
        where: tokens at which senders are changed: all, decision, image, question, reasoning, answer, template.
        between: frozen: nothing between sender and receiver is computed again; mlps: the MLPs are, and are no
            receivers (Wang et al. 2211.00593).
        decision: decisive, first or soft: see `interp.decision.find_decisions`.
        out: folder for paths.csv, paths_senders.csv, paths.nc, the figures and report.html.
    """

    senders: tuple[str, ...] = ()
    top: int = 3
    map: Path | None = None
    receivers: tuple[str, ...] = ()
    direction: Literal["both", "rl_to_in", "in_to_rl"] = "both"
    where: Literal["all", "decision", "image", "question", "reasoning", "answer", "template"] = "all"
    between: Between = "frozen"
    decision: Choice = "decisive"
    out: Path = Path("out/paths")


def run(config: PathsConfig) -> Section:
    """Patch paths and write tables, dataset, figures and report.html, all or none.

    Raises:
        FrankenlensError: settings contradict each other, the models are no pair, the data cannot be read, no prompt
            qualifies, or an address is not in the model.
    """
    check(config)
    pair = load_pair(config)
    try:
        _check_addresses(config, pair)
        examples, dropped = load_examples(config, config.seed)
        section = measure(pair, examples, config, dropped)
        counts = {"examples": len(examples)}
        if section.dataset is not None:
            counts["decisions"] = section.dataset.sizes["example"]
        publish([section], config, config.out, pair.provenance(), counts)
    finally:
        pair.close()
    return section


def check(config: PathsConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    if config.top < 1:
        raise FrankenlensError(f"--top is {config.top}; give at least 1.")
    if config.senders and config.map is not None:
        raise FrankenlensError("--senders names the senders and --map chooses them; give one of the two.")
    if config.map is not None and not config.map.is_file():
        raise FrankenlensError(f"--map {config.map} does not exist; `frankenlens map` writes one.")
    for name in config.senders:
        parse_sender(name)
    for name in config.receivers:
        Receiver.parse(name)


def measure(
    pair: Pair, examples: list[Example], config: PathsConfig, dropped: Mapping[str, int] | None = None
) -> Section:
    """Find the decisions, choose the senders, and patch all their paths.

    Raises:
        FrankenlensError: no prompt qualifies; the message says why not.
    """
    decisions = find_decisions(
        pair,
        examples,
        config.decision,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        progress=True,
    )
    decisions, without = _with_role(decisions, config.where)
    left_out = {**(dropped or {}), **decisions.excluded, **without}
    if not len(decisions):
        reasons = "; ".join(f"{n}: {reason}" for reason, n in left_out.items() if n)
        raise FrankenlensError(
            f"None of {len(examples)} prompts qualifies ({reasons}). Give more (--n), another --decision or --where."
        )
    senders, chosen = _senders(pair, decisions, config)
    effects = pair_paths(
        pair,
        decisions,
        senders=senders,
        receivers=config.receivers or None,
        directions=list(DIRECTIONS) if config.direction == "both" else [config.direction],
        where=config.where,
        between=config.between,
        batch_size=config.batch_size,
    )
    nulls = null_pair_denominator(pair, decisions, config.seed, config.batch_size)
    refused = recovery_refused(decisions, nulls)
    paths = path_table(effects, refused=refused, seed=config.seed)
    wholes = sender_table(effects, refused=refused, seed=config.seed)
    figures = {"paths_map": plot_path_map(paths), "paths_graph": plot_path_graph(paths)}
    finding = " ".join(
        [_denominator(decisions, nulls, refused), *_found(paths, wholes, decisions.metric.units)]
    )
    account = _account(config, decisions, chosen, {reason: n for reason, n in left_out.items() if n})
    tables = {"paths": paths, "paths_senders": wholes}
    return Section("paths", "By which paths RL's components act", finding, account, tables, figures, effects)


def _check_addresses(config: PathsConfig, pair: Pair) -> None:
    """Refuse what the model does not have before anything runs."""
    if config.senders:
        paths_between(pair.in_, config.senders, config.receivers or None, config.between)
    elif config.receivers:
        paths_between(pair.in_, None, config.receivers, config.between)


def _with_role(decisions: DecisionSet, where: str) -> tuple[DecisionSet, dict[str, int]]:
    """The decisions whose prompts have such tokens, and how many have none."""
    if where in ("all", "decision"):
        return decisions, {}
    rows = [i for i, prompt in enumerate(decisions.prompts) if where in prompt.roles]
    kept = replace(
        decisions,
        decisions=tuple(decisions.decisions[i] for i in rows),
        metric=decisions.metric.select(rows),
        in_values=decisions.in_values[rows],
        rl_values=decisions.rl_values[rows],
    )
    return kept, {f"no {where} token before the decision": len(decisions) - len(rows)}


def _senders(pair: Pair, decisions: DecisionSet, config: PathsConfig) -> tuple[list[str], str]:
    """Addresses, and how they were chosen."""
    if config.senders:
        return list(config.senders), "named in advance"
    if config.map is None:
        effects = attribute(pair, decisions, points=("mlp_out", "head"), roles=[config.where], progress=False)
        how = "attribution patching on the same prompts"
    else:
        effects, how = load_dataset(config.map), f"the component map {config.map.name}"
        if config.where not in effects["role"].to_numpy():
            raise FrankenlensError(
                f"--map {config.map} has no role {config.where!r}, only {', '.join(effects['role'].to_numpy())}."
            )
    names = _strongest(effects, config)
    return (
        names,
        f"the {len(names)} strongest heads and MLPs by {how}, so their whole effects are biased upward",
    )


def _strongest(effects: xr.Dataset, config: PathsConfig) -> list[str]:
    """Heads and MLPs with the largest |mean effect| of a direction, in the order of the layers."""
    some = effects.isel(component=np.isin(effects["point"].to_numpy(), ["head", "mlp_out"]))
    if not some.sizes["component"]:
        raise FrankenlensError(
            f"--map {config.map} has neither heads nor MLPs; make it with --points head mlp_out."
        )
    size = np.abs(some["effect"].sel(role=config.where).mean("example")).max("direction")
    best = size.fillna(0).argsort().to_numpy()[::-1][: config.top]
    return some["component"].to_numpy()[np.sort(best)].tolist()


def _denominator(decisions: DecisionSet, nulls: Mapping[str, Interval], refused: str) -> str:
    own = decisions.denominator()
    text = f"RL − IN {interval_text(own.value, own.low, own.high)} {decisions.metric.units} (n = {len(decisions)})"
    learnt = "; ".join(f"{name} {interval_text(x.value, x.low, x.high)}" for name, x in nulls.items())
    text += f"; pairs that learnt nothing: {learnt}." if learnt else "."
    return text + (f" No recovery is given: {refused}." if refused else "")


def _found(paths: pd.DataFrame, wholes: pd.DataFrame, units: str) -> list[str]:
    """Per direction the strongest path and sender, with intervals and the control."""
    key = "recovery" if paths["recovery"].notna().any() else "direct"
    said = []
    for direction in dict.fromkeys(paths["direction"]):
        one = paths.loc[paths["direction"] == direction].sort_values(key, key=abs, ascending=False)
        best = one.iloc[0]
        own = wholes.loc[(wholes["direction"] == direction) & (wholes["sender"] == best["sender"])].iloc[0]
        text = (
            f"{WORDS[str(direction)]}, strongest of {len(one)} paths: {best['path']}, {key} {_text(best, key)}; with "
            f"the donor on another example {_text(best, 'other_recovery')} (n = {best['other_n']}). Whole effect of "
            f"{best['sender']}: {_text(own, 'whole')} {units}"
        )
        text += f", recovery {_text(own, 'recovery')}" if key == "recovery" else ""
        if not np.isnan(own["interaction"]):
            text += f"; sum of its direct paths {_text(own, 'sum')}, interaction {_text(own, 'interaction')}"
        said.append(text + ".")
    return said


def _text(row: pd.Series, name: str) -> str:
    value, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))  # type: ignore[arg-type]
    return interval_text(value, low, high)


def _account(
    config: PathsConfig, decisions: DecisionSet, chosen: str, left_out: Mapping[str, int]
) -> Account:
    passes = {
        "frozen": "everything between sender and receiver frozen at its clean value",
        "mlps": "attention between sender and receiver frozen, MLPs computed again (Wang et al. 2211.00593)",
    }[config.between]
    return Account(
        "path patching (Goldowsky-Dill et al. 2304.05969): the receiver's input is the clean residual stream plus the "
        f"donor's minus the recipient's output of the sender at {config.where} tokens, its pre-norm computed again; "
        f"{passes}; behind the receiver everything is computed again; k and v are those of kv_heads; recovery: ratio "
        "of sums, 95 % bootstrap over prompts; interaction: whole effect − sum of direct effects; senders: "
        + chosen,
        f"{len(decisions)} decisions ({config.decision}) of {decisions.n_prompts} prompts",
        "Holm over the paths of a direction (p); intervals are per path",
        config.seed,
        left_out=left_out,
    )
