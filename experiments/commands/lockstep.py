"""Do the components that a map finds strong carry RL's answers? Moved in and out while both models generate together.

`frankenlens lockstep` is the command; the pieces are in `interp.lockstep` and `interp.steering`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import xarray as xr

from experiments.settings import DataSettings, PairSettings, load_examples, load_pair, publish, require_sound
from hooks import HookedVLM
from hooks.address import Address
from hooks.errors import FrankenlensError
from interp.decision import find_decisions
from interp.hypotheses import examples_of
from interp.lockstep import EVERYWHERE, Moved, Sampling, confirm, confirmation
from interp.lockstep.controls import alike, kind_of, overlap
from interp.lockstep.plots import plot_confirmation, plot_followed
from interp.map.component_map import component_map
from interp.map.summary import strongest, summarise
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.questions.examples import Example, fingerprint, with_looked_at
from interp.results.files import load_dataset
from interp.results.page import Account, Section
from interp.statistics import interval_text
from interp.steering import (
    differences,
    dose_response,
    dose_table,
    mean_difference,
    principal_directions,
)
from interp.steering.plots import plot_dose

_POINTS = ("attn_out", "mlp_out", "head")
_WORDS = {"rl_to_in": "moved in", "in_to_rl": "moved out"}


@dataclass(frozen=True)
class LockstepConfig(PairSettings, DataSettings):
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
    top: tuple[int, ...] = (1, 4)
    when: tuple[str, ...] = EVERYWHERE
    n_random: int = 3
    temperature: float = 0.0
    top_p: float = 1.0
    steer: str | None = None
    coefficients: tuple[float, ...] = (0.5, 1.0, 2.0)
    correction: Literal["holm", "bh"] = "holm"
    out: Path = Path("out/lockstep")


def run(config: LockstepConfig) -> Section:
    """Measure, and write tables, figures, dataset and page, all or none.

    Returns:
        The section of the page, with all tables.

    Raises:
        FrankenlensError: settings contradict each other, the models are no pair, the data cannot be read, no question
            is left, or a component does not exist.
    """
    check(config)
    examples, dropped = load_examples(config, config.seed)
    pair = load_pair(config)
    try:
        section = measure(pair, examples, config, dropped)
        publish([section], config, config.out, pair.provenance(), {"examples": len(examples)})
    finally:
        pair.close()
    return section


def check(config: LockstepConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
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
        load_dataset(config.map)


def measure(
    pair: Pair,
    examples: Sequence[Example],
    config: LockstepConfig,
    dropped: Mapping[str, int] | None = None,
) -> Section:
    """Components moved in and out, and directions added, as a section of a page.

    Args:
        pair: IN and RL; as they were, afterwards.
        examples: what is asked, also for choosing the components where the settings do not name them.
        config: the settings.
        dropped: reason to number of examples that could not be read.

    Raises:
        FrankenlensError: as `run`.
    """
    chosen = _chosen(pair, examples, config)
    sampling = _sampling(config) if config.temperature else None
    settings = {
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.batch_size,
        "sampling": sampling,
    }
    found = confirm(
        pair, chosen.fresh, chosen.sets, n_random=config.n_random, seed=config.seed, when=config.when, **settings
    )  # fmt: skip
    table = confirmation(found, config.correction, seed=config.seed)
    shown = str(table["function"].iloc[-1])
    tables = {"lockstep": table}
    figures = {"lockstep": plot_confirmation(table, shown), "lockstep_traces": plot_followed(table, shown)}
    findings = [_finding(table, shown)]
    if config.steer is not None:
        steered, doses = _steered(pair, chosen, config, settings)
        tables["steering"], figures["steering"] = doses, plot_dose(doses, shown)
        findings.append(_steering_finding(doses, shown))
        found = found.merge(steered, join="outer", compat="no_conflicts")
    account = _account(config, chosen, found, dropped or {})
    title = "Components moved while both models generate"
    found = with_looked_at(found, examples)
    return Section("lockstep", title, " ".join(findings), account, tables, figures, found)


@dataclass(frozen=True)
class _Chosen:
    """What is moved, on which questions it was chosen, and on which it is tried."""

    sets: Mapping[str, tuple[str, ...]]
    used: Sequence[Example]
    fresh: Sequence[Example]
    how: str
    left_out: Mapping[str, int]


def _chosen(pair: Pair, examples: Sequence[Example], config: LockstepConfig) -> _Chosen:
    if config.components:
        sets = {"components": config.components}
        return _Chosen(sets, [], examples, f"components given: {', '.join(config.components)}", {})
    if config.map is not None:
        summary = load_dataset(config.map)
        seen = examples_of(config.map)
        fresh = [one for one in examples if one.id not in seen and fingerprint(one) not in seen]
        if not fresh:
            raise FrankenlensError(
                f"all {len(examples)} questions were looked at when {config.map} was made, and components must be "
                "confirmed on others: give more of them (--n), another --seed for the synthetic ones, or other --data."
            )
        used, how = [], f"strongest of {config.map.name}"
        left_out = {"looked at when the map was made": len(examples) - len(fresh)}
    else:
        used, fresh = examples[::2], examples[1::2]
        summary, n = _small_map(pair, used, config)
        how = f"strongest of a map on the decisive tokens of {n} of {len(used)} other questions"
        left_out = {"used to choose the components": len(used)}
    picked, passed = _pick(pair.in_, summary, max(config.top))
    sizes = sorted({min(size, len(picked)) for size in config.top})
    how += f": {', '.join(picked)}" + (f" (passed over: {passed})" if passed else "")
    return _Chosen({f"top {size}": picked[:size] for size in sizes}, used, fresh, how, left_out)


def _small_map(pair: Pair, used: Sequence[Example], config: LockstepConfig) -> tuple[xr.Dataset, int]:
    run = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size, "progress": True}
    decisions = find_decisions(pair, used, "decisive", **run)
    if not len(decisions):
        reasons = "; ".join(f"{n}: {reason}" for reason, n in decisions.excluded.items())
        raise FrankenlensError(
            f"no component can be chosen: none of {len(used)} questions has a decisive token ({reasons}). Give more "
            "questions (--n), or the components themselves (--components)."
        )
    effects = component_map(pair, decisions, ["rl_to_in"], _POINTS, ["all"], config.batch_size)
    return summarise(effects, seed=config.seed), len(decisions)


def _pick(vlm: HookedVLM, summary: xr.Dataset, k: int) -> tuple[tuple[str, ...], str]:
    """The k strongest that share nothing and leave others of their kind as a control; and what was passed over."""
    direction = "rl_to_in" if "rl_to_in" in summary["direction"].to_numpy() else "in_to_rl"
    picked: list[str] = []
    passed: list[str] = []
    kinds: Counter = Counter()
    for name in strongest(summary, direction, summary.sizes["component"])["component"]:
        if len(picked) == k:
            break
        address = Address.parse(str(name))
        kind = kind_of(address)
        if any(overlap(address, Address.parse(other)) for other in picked):
            passed.append(f"{name}, part of another")
        elif 2 * (kinds[kind] + 1) > len(alike(vlm, kind)):
            passed.append(f"{name}, too few others of its kind for a control")
        else:
            picked.append(str(name))
            kinds[kind] += 1
    if not picked:
        raise FrankenlensError("the map has no component that can be moved; give --components.")
    return tuple(picked), ", ".join(passed)


def _sampling(config: LockstepConfig) -> Sampling:
    return Sampling(config.temperature, config.top_p, config.seed)


def _steered(
    pair: Pair, chosen: _Chosen, config: LockstepConfig, settings: dict
) -> tuple[xr.Dataset, pd.DataFrame]:
    """IN with RL − IN added, RL with it subtracted."""
    site = str(config.steer)
    prompts = [pair.builder.build(example) for example in chosen.used]
    written = greedy(pair.rl, prompts, config.max_new_tokens, config.batch_size)
    traces = [prompt.with_tokens(ids) for prompt, ids in zip(prompts, written, strict=True)]
    found = differences(pair, traces, site, config.when, config.batch_size)
    directions = [mean_difference(found, site), *principal_directions(found, site, 1)]
    tables, kept = [], []
    for name, vlm, sign in (("IN", pair.in_, 1.0), ("RL", pair.rl, -1.0)):
        coefficients = [sign * c for c in config.coefficients]
        dose = dose_response(
            vlm, pair.builder, chosen.fresh, directions, coefficients, n_random=config.n_random, seed=config.seed,
            when=config.when, **settings,
        )  # fmt: skip
        tables.append(dose_table(dose, config.correction, seed=config.seed).assign(model=name))
        dims = {"condition": f"steered_{name}", "coefficient": f"coefficient_{name}"}
        own = dose.reset_coords(["group", "draw", "site", "norm", "share"]).rename(dims)
        kept.append(own.rename({v: f"steered_{name}_{v}" for v in own.data_vars}))
    return kept[0].merge(kept[1], join="outer", compat="no_conflicts"), pd.concat(tables, ignore_index=True)


def _finding(table: pd.DataFrame, shown: str) -> str:
    """The largest set, both ways, against the recipient and against chance."""
    own = table.loc[(table["function"] == shown) & (table["draw"] < 0)]
    sentences = []
    for _, row in own.iterrows():
        text = (
            f"{row['condition']} ({row['components']}) {_WORDS[row['direction']]}: {_points(row, 'change')} points of "
            f"accuracy (n = {row['n']}; McNemar p = {row['p']:.2g}, corrected {row['p_corrected']:.2g})"
        )
        if row["above"] == row["above"]:
            told = row["p_above_corrected"] < 0.05
            verdict = "told apart from" if told else "not told apart from"
            text += f", {_points(row, 'above')} beyond random components, {verdict} them"
        sentences.append(f"{text}.")
    return " ".join(sentences)


def _steering_finding(doses: pd.DataFrame, shown: str) -> str:
    own = doses.loc[(doses["function"] == shown) & (doses["draw"] < 0)]
    sentences = []
    for model, some in own.groupby("model"):
        best = some.loc[(some["change"].abs()).idxmax()]
        sentences.append(
            f"{model} {best['coefficient']:+g} x {best['condition']} difference at {best['site']}: "
            f"{_points(best, 'change')} points (n = {best['n']}, p corrected {best['p_corrected']:.2g}; the largest of "
            f"{len(some)} doses), {_points(best, 'above')} beyond random directions."
        )
    return " ".join(sentences)


def _points(row: pd.Series, name: str) -> str:
    return interval_text(*(100 * row[f"{name}{end}"] for end in ("", "_low", "_high")))


def _account(
    config: LockstepConfig, chosen: _Chosen, found: xr.Dataset, dropped: Mapping[str, int]
) -> Account:
    how = (
        "greedy" if not config.temperature else f"temperature {config.temperature:g}, top-p {config.top_p:g}"
    )
    definition = (
        f"lockstep generation ({how}), moved at {', '.join(config.when)}; {chosen.how}; change of accuracy paired with "
        f"the recipient's (bootstrap, 95 %), exact McNemar; random: {config.n_random} sets of equal number and kind, "
        "paired with their mean (sign flips)"
    )
    unrun = (
        found["why"]
        .isel(direction=0, condition=0)
        .where(found["right"].isel(direction=0, condition=0).isnull(), "")
    )
    reasons = Counter(str(why) for why in unrun.to_numpy() if why)
    sets = 2 * len(chosen.sets)
    name = {"holm": "Holm", "bh": "Benjamini-Hochberg"}[config.correction]
    return Account(
        definition,
        f"{len(chosen.fresh)} questions",
        f"{name} over {sets} sets and directions",
        config.seed,
        left_out={**dropped, **chosen.left_out, **reasons},
    )
