"""Do the components that a map finds strong carry RL's answers? Moved in and out while both models generate together.

`frankenlens lockstep` is the command; the pieces are in `interp.lockstep` and `interp.steering`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from experiments.bench import Planned
from experiments.commands.lockstep_plan import POINTS, assumed, work
from experiments.frame import Command, kept
from experiments.options import Only, default
from experiments.settings import (
    CORRECTIONS,
    Correction,
    Questions,
    QuestionSettings,
    load_pair,
    load_questions,
    require_there,
)
from hooks.address import Address
from hooks.errors import FrankenlensError
from interp.decision import find_decisions
from interp.hypotheses import examples_of
from interp.lockstep import EVERYWHERE, Moved, Sampling, confirm, confirmation, independent
from interp.lockstep.plots import plot_confirmation, plot_followed
from interp.map import component_map, strongest, summarise
from interp.map.summary import READ_OF_CELLS
from interp.pair.pair import Pair
from interp.questions.examples import Example, with_looked_at
from interp.questions.readers import Seen
from interp.results.files import load_dataset, require_parts
from interp.results.page import Account, Section, told
from interp.results.store import Store, under
from interp.statistics import interval_text
from interp.steering import pair_directions, steer_both
from interp.steering.plots import plot_dose

_WORDS = {"rl_to_in": "moved in", "in_to_rl": "moved out"}


@dataclass(frozen=True)
class LockstepConfig(QuestionSettings):
    """Settings of lockstep generation; the defaults run on the pair that ships with the package.

    Attributes:
        components: addresses that are moved together, e.g. blocks.3.mlp blocks.5.attn.head.1. Without them the
            strongest of a map are taken.
        map: map.nc of `frankenlens map`; questions that it looked at are left out. Without one, a small map (attention,
            MLPs and heads, all tokens together) is made on every other question, and the rest confirm it.
        top: how many of the strongest are moved together; several sizes make several sets.
        when: tokens at which they are moved: prefill, generated, image, question, reasoning, answer, template.
        n_random: random sets of equal number and kind beside each set, and random directions beside each direction.
        temperature: 0 for greedy, otherwise every token is drawn with --seed.
        top_p: share of the probability that is drawn from.
        steer: a site such as blocks.5.hook_resid_post: the difference RL − IN there (mean and first principal
            direction, over the tokens of RL's traces named in --when) is added to IN and subtracted from RL. Needs
            questions that the directions are made from, so not together with --components or --map.
        coefficients: of the directions; 1 is as much as RL − IN has.
        correction: of p values, over sets and directions, or over directions and coefficients.
        n: questions, in equal shares over the synthetic reasoning tasks where no data is given.
        out: folder for lockstep.csv, steering.csv, the figures, lockstep.nc and report.html.
    """

    n: int = 200
    components: tuple[str, ...] = ()
    map: Path | None = None
    top: tuple[int, ...] = default((1, 4), only=Only("a map: no --components", lambda c: not c.components))
    when: tuple[str, ...] = EVERYWHERE
    n_random: int = 3
    temperature: float = 0.0
    top_p: float = default(1.0, only=Only("a --temperature above 0", lambda config: config.temperature))
    steer: str | None = None
    coefficients: tuple[float, ...] = default(
        (0.5, 1.0, 2.0), only=Only("--steer", lambda config: config.steer is not None)
    )
    correction: Correction = "holm"
    out: Path = Path("out/lockstep")


def check(config: LockstepConfig) -> None:
    """Refuse components, maps, sizes, tokens and coefficients that there are not, or that do not go together."""
    if config.components and config.map is not None:
        raise FrankenlensError("--components and --map both say what is moved: give one of them.")
    if config.steer is not None and (config.components or config.map is not None):
        raise FrankenlensError(
            "--steer makes its directions from the questions that choose the components, and with --components or "
            "--map there are none: leave those out, or call interp.steering."
        )
    for address in config.components:
        Address.parse(address)
    Moved(config.components or "blocks.0", config.when)
    if not config.top or min(config.top) < 1 or config.n_random < 0:
        raise FrankenlensError(
            f"--top is {config.top} and --n-random {config.n_random}; give sizes of at least 1, and at least 0."
        )
    if config.steer is not None and (not config.coefficients or 0 in config.coefficients):
        raise FrankenlensError("--coefficients are numbers other than 0; 0 is the model as it is.")
    if config.temperature:
        _sampling(config)
    if config.map is not None:
        require_there(config)
        _map(config.map)


def load(config: LockstepConfig) -> Questions:
    """The questions; none that a map looked at.

    Raises:
        FrankenlensError: no row can be read, or the map looked at all of them.
    """
    if config.map is None:
        return load_questions(config)
    return load_questions(config, Seen(examples_of(config.map), "when the map was made"))


def measure(pair: Pair, asked: Questions, config: LockstepConfig) -> Iterator[Section]:
    """Components moved in and out, and directions added.

    Raises:
        FrankenlensError: no question is left, or a component does not exist.
    """
    keep = kept(pair, asked.examples, config, looked_at=_digest(config))
    chosen = _chosen(pair, asked.examples, config, keep)
    settings: dict[str, Any] = {
        **config.running,
        "sampling": _sampling(config) if config.temperature else None,
        "n_random": config.n_random,
        "seed": config.seed,
        "when": config.when,
    }
    found = confirm(pair, chosen.fresh, chosen.sets, keep=under(keep, "confirm"), **settings)
    table = confirmation(found, config.correction)
    shown = str(table["function"].iloc[-1])
    tables = {"lockstep": table}
    figures = {"lockstep": plot_confirmation(table, shown), "lockstep_traces": plot_followed(table, shown)}
    findings = _finding(table, shown)
    if config.steer is not None:
        own = under(keep, "directions")
        directions = pair_directions(pair, chosen.used, config.steer, config.when, keep=own, **config.running)
        settings["correction"] = config.correction
        steered, doses = steer_both(
            pair, chosen.fresh, directions, config.coefficients, keep=under(keep, "steer"), **settings
        )
        tables["steering"], figures["steering"] = doses, plot_dose(doses, shown)
        findings += _steering_finding(doses, shown)
        found = found.merge(steered, join="outer", compat="no_conflicts")
    said = told(findings)
    yield Section(
        "lockstep",
        "Components moved while both models generate",
        said[0],
        _account(config, chosen, found, len(asked.examples)),
        tables,
        figures,
        with_looked_at(found, asked.examples, config.map and load_dataset(config.map)),
        details=said[1],
    )


def _map(path: Path) -> xr.Dataset:
    """The summary of a component map on disk.

    Raises:
        FrankenlensError: it is none.
    """
    cells = ("component", "role", "direction")
    parts = dict.fromkeys(READ_OF_CELLS, cells)
    parts |= {"point": ("component",), **dict.fromkeys(cells, ())}
    summary = require_parts(load_dataset(path), path, parts, "map")
    if "refused" not in summary.attrs:
        raise FrankenlensError(f"{path} is no result of `frankenlens map`; give one.")
    return summary


@dataclass(frozen=True)
class _Chosen:
    """What is moved, on which questions it was chosen, and on which it is tried."""

    sets: Mapping[str, tuple[str, ...]]
    used: Sequence[Example]
    fresh: Sequence[Example]
    how: str
    left_out: Mapping[str, int]


def _digest(config: LockstepConfig) -> str:
    """Of the map that components are taken from."""
    return "" if config.map is None else sha256(config.map.read_bytes()).hexdigest()


def _chosen(pair: Pair, examples: Sequence[Example], config: LockstepConfig, keep: Store | None) -> _Chosen:
    if config.components:
        sets = {"components": config.components}
        return _Chosen(sets, [], examples, f"components given: {', '.join(config.components)}", {})
    if config.map is not None:
        used, fresh, left_out = [], examples, {}
        summary, how = _map(config.map), f"strongest of {config.map.name}"
    else:
        used, fresh = examples[::2], examples[1::2]
        summary, n = _small_map(pair, used, config, under(keep, "chosen"))
        how = f"strongest of a map on the decisive tokens of {n} of {len(used)} other questions"
        left_out = {"used to choose the components": len(used)}
    direction = "rl_to_in" if "rl_to_in" in summary["direction"].to_numpy() else "in_to_rl"
    ranked = strongest(summary, direction, summary.sizes["component"])["component"]
    picked = independent(pair.in_, map(str, ranked), max(config.top))
    sizes = sorted({min(size, len(picked.components)) for size in config.top})
    sets = {f"top {size}": picked.components[:size] for size in sizes}
    return _Chosen(sets, used, fresh, f"{how}: {picked}", left_out)


def _small_map(
    pair: Pair, used: Sequence[Example], config: LockstepConfig, keep: Store | None
) -> tuple[xr.Dataset, int]:
    """Of the strongest points, at all tokens together, and of how many questions."""
    decisions = find_decisions(pair, used, "decisive", progress=True, keep=keep, **config.running)
    if not len(decisions):
        reasons = "; ".join(f"{n}: {reason}" for reason, n in decisions.excluded.items())
        raise FrankenlensError(
            f"no component can be chosen: none of {len(used)} questions has a decisive token ({reasons}). Give more "
            f"than --n {config.n}, or the components themselves (--components), such as a map of the decision first or "
            "soft finds (`frankenlens map --decision soft`, then --map)."
        )
    effects = component_map(pair, decisions, ["rl_to_in"], POINTS, ["all"], config.batch_size, keep=keep)
    return summarise(effects), len(decisions)


def _sampling(config: LockstepConfig) -> Sampling:
    return Sampling(config.temperature, config.top_p, config.seed)


def _finding(table: pd.DataFrame, shown: str) -> list[str]:
    """Every set, the largest first, both ways, against the recipient and against chance."""
    own = table.loc[(table["function"] == shown) & (table["draw"] < 0)]
    own = own.sort_values("size", ascending=False, kind="stable")
    sentences = []
    for _, row in own.iterrows():
        text = (
            f"{row['condition']} ({row['components']}) {_WORDS[row['direction']]}: {_points(row, 'change')} points of "
            f"accuracy (n = {row['n']}; McNemar p = {row['p']:.2g}, corrected {row['p_corrected']:.2g})"
        )
        if row["above"] == row["above"]:
            sure = row["p_above_corrected"] < 0.05
            verdict = "told apart from" if sure else "not told apart from"
            text += f", {_points(row, 'above')} beyond random components, {verdict} them"
        sentences.append(f"{text}.")
    return sentences


def _steering_finding(doses: pd.DataFrame, shown: str) -> list[str]:
    own = doses.loc[(doses["function"] == shown) & (doses["draw"] < 0)]
    sentences = []
    for model, some in own.groupby("model"):
        best = some.loc[(some["change"].abs()).idxmax()]
        sentences.append(
            f"{model} {best['coefficient']:+g} x {best['condition']} difference at {best['site']}: "
            f"{_points(best, 'change')} points (n = {best['n']}, p corrected {best['p_corrected']:.2g}; the largest of "
            f"{len(some)} doses), {_points(best, 'above')} beyond random directions."
        )
    return sentences


def _points(row: pd.Series, name: str) -> str:
    return interval_text(*(100 * row[f"{name}{end}"] for end in ("", "_low", "_high")))


def _account(config: LockstepConfig, chosen: _Chosen, found: xr.Dataset, n_examples: int) -> Account:
    drawn = f"temperature {config.temperature:g}, top-p {config.top_p:g}"
    definition = (
        f"lockstep generation ({drawn if config.temperature else 'greedy'}), moved at {', '.join(config.when)}; "
        f"{chosen.how}; change of accuracy paired with the recipient's (95 %), exact McNemar; random: "
        f"{config.n_random} sets of equal number and kind, paired with their mean"
    )
    one = found.isel(direction=0, condition=0)
    unrun = Counter(str(why) for why in one["why"].where(one["right"].isnull(), "").to_numpy() if why)
    return Account(
        definition,
        f"{len(chosen.fresh)} questions",
        f"{CORRECTIONS[config.correction]} over {2 * len(chosen.sets)} sets and directions",
        config.seed,
        left_out={**chosen.left_out, **unrun},
        counts={"examples": n_examples},
    )


COMMAND = Command(
    LockstepConfig, check, load, load_pair, measure, plan=Planned(work, assumed=assumed), on_ray=True
)
