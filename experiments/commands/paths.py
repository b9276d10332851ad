"""By which paths do RL's components act on the decision: straight on the logits, or through later heads and MLPs?

`frankenlens paths` is the command; the pieces are in `interp.paths`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

from experiments.bench import Bench, Planned
from experiments.frame import Command
from experiments.options import Only, default
from experiments.settings import Questions, QuestionSettings, load_pair, load_questions, require_there
from hooks.errors import FrankenlensError
from interp.decision import Choice, DecisionSet, find_decisions, null_pair_denominator, recovery_refused
from interp.map import DIRECTIONS, attribute
from interp.map.report import WORDS
from interp.pair.pair import Pair
from interp.paths import Receiver, paths_between, strongest_senders
from interp.paths.pair import pair_paths, path_table, sender_table
from interp.paths.path import Between, parse_sender
from interp.paths.plots import plot_path_graph, plot_path_map
from interp.plan import decisions as plans
from interp.plan.attribution import attributed
from interp.plan.paths import PathsPlan
from interp.plan.work import Work
from interp.results.files import load_dataset, require_parts
from interp.results.page import Account, Section
from interp.statistics import Interval, interval_text


@dataclass(frozen=True)
class PathsConfig(QuestionSettings):
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
    top: int = default(3, only=Only("no --senders", lambda config: not config.senders))
    map: Path | None = None
    receivers: tuple[str, ...] = ()
    direction: Literal["both", "rl_to_in", "in_to_rl"] = "both"
    where: Literal["all", "decision", "image", "question", "reasoning", "answer", "template"] = "all"
    between: Between = "frozen"
    decision: Choice = "decisive"
    out: Path = Path("out/paths")


def check(config: PathsConfig) -> None:
    """Refuse senders, receivers and maps that there are not, and two ways of choosing senders."""
    if config.top < 1:
        raise FrankenlensError(f"--top is {config.top}; give at least 1.")
    if config.senders and config.map is not None:
        raise FrankenlensError("--senders names the senders and --map chooses them; give one of the two.")
    if config.map is not None:
        require_there(config)
        _map(config.map)
    for name in config.senders:
        parse_sender(name)
    for name in config.receivers:
        Receiver.parse(name)


def measure(pair: Pair, asked: Questions, config: PathsConfig) -> Iterator[Section]:
    """Find the decisions, choose the senders, and patch all their paths.

    Raises:
        FrankenlensError: an address is not in the model; or no prompt qualifies, and the message says why not.
    """
    _require_addresses(config, pair)
    every = find_decisions(pair, asked.examples, config.decision, progress=True, **config.running)
    decisions = every.having(config.where)
    left_out = {**every.excluded, f"no {config.where} token before the decision": len(every) - len(decisions)}
    left_out = {reason: n for reason, n in left_out.items() if n}
    decisions.require_some({**asked.left_out, **left_out})
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
    paths = path_table(effects, refused=refused)
    wholes = sender_table(effects, refused=refused)
    found = [_denominator(decisions, nulls, refused), *_found(paths, wholes, decisions.metric.units)]
    yield Section(
        "paths",
        "By which paths RL's components act",
        " ".join(found),
        _account(config, decisions, chosen, left_out),
        {"paths": paths, "paths_senders": wholes},
        {"paths_map": plot_path_map(paths), "paths_graph": plot_path_graph(paths)},
        effects,
    )


def _require_addresses(config: PathsConfig, pair: Pair) -> None:
    """Refuse what the model does not have before anything runs."""
    if config.senders or config.receivers:
        paths_between(pair.in_, config.senders or None, config.receivers or None, config.between)


def _map(path: Path) -> xr.Dataset:
    """A component map on disk.

    Raises:
        FrankenlensError: it is none.
    """
    parts = {"effect": ("component", "role", "direction", "example"), "point": ("component",), "role": ()}
    return require_parts(load_dataset(path), path, {**parts, "component": ()}, "map")


def _senders(pair: Pair, decisions: DecisionSet, config: PathsConfig) -> tuple[list[str], str]:
    """Addresses, and how they were chosen."""
    if config.senders:
        return list(config.senders), "named in advance"
    if config.map is None:
        effects = attribute(pair, decisions, points=("mlp_out", "head"), roles=[config.where], progress=False)
        how = "attribution patching on the same prompts"
    else:
        effects, how = _map(config.map), f"the component map {config.map.name}"
    names = strongest_senders(effects, config.top, config.where)
    return (
        names,
        f"the {len(names)} strongest heads and MLPs by {how}, so their whole effects are biased upward",
    )


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
            f"{WORDS[str(direction)]}, strongest of {len(one)} paths: {best['path']}, {key} {_text(best, key)}; "
            f"with the donor's change on another example {_text(best, 'other_recovery')} (n = {best['other_n']}). "
            f"Whole effect of "
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
        "of sums, 95 % intervals over prompts; interaction: whole effect − sum of direct effects; senders: "
        + chosen,
        f"{len(decisions)} decisions ({config.decision}) of {decisions.n_prompts} prompts",
        "Holm over the paths of a direction (p); intervals are per path",
        config.seed,
        left_out=left_out,
        counts={"examples": decisions.n_prompts, "decisions": len(decisions)},
    )


def work(bench: Bench, config: PathsConfig) -> Iterator[Work]:
    """What `measure` computes, counted and not run."""
    asked, runs, choice = bench.workload, bench.runs(), config.decision
    for one in plans.found_decisions(runs, asked, choice):
        yield one.times(asked.scale)
    some, reads = asked.traces if choice == "soft" else asked.cut, plans.reads_of(choice)
    share = asked.scale * (1.0 if choice == "soft" else asked.decided)
    if not config.senders and config.map is None:
        yield attributed(runs, some, reads, ("mlp_out", "head")).times(share)
    directions = 2 if config.direction == "both" else 1
    given = (_planned_senders(bench, config), config.receivers or None, config.where, config.between)
    paths = PathsPlan(runs, reads, *given, bench.at_tokens).work(some, "paths of the senders, and in order")
    yield paths.times(directions * share)
    yield plans.null_pairs(runs, asked, choice).times(asked.scale)


def _planned_senders(bench: Bench, config: PathsConfig) -> tuple[str, ...]:
    """Those that are named; else MLPs as many, all over the layers."""
    if config.senders:
        return config.senders
    n = bench.vlm.n_layers
    layers = dict.fromkeys(min(n - 1, int((i + 0.5) * n / config.top)) for i in range(config.top))
    return tuple(f"blocks.{layer}.mlp" for layer in layers)


def assumed(bench: Bench, config: PathsConfig) -> Iterator[str]:
    """What `work` takes for granted."""
    yield f"every prompt with a decision has {config.where} tokens before it"
    if not config.senders:
        yield f"the strongest senders: {', '.join(_planned_senders(bench, config))}"


COMMAND = Command(PathsConfig, check, load_questions, load_pair, measure, plan=Planned(work, assumed=assumed))
