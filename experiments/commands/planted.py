"""Which localizing method finds what was hidden, and claims nothing where nothing is? Pairs with a known change.

`frankenlens planted` is the command; the pieces are in `interp.planting`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from tqdm.auto import tqdm

from experiments.planting import KINDS, MOST, TRAINED, Garden, PlantedConfig
from experiments.retraining.triple import require_triple
from experiments.settings import checkpoints, load_pair, publish, require_sound
from hooks.errors import FrankenlensError, nearest
from interp.pair.pair import Pair
from interp.planting import chosen, on_grid
from interp.planting.plots import plot_found
from interp.planting.table import by_effect, by_pair, found_table, null_table
from interp.results.page import Account, Section
from interp.statistics import interval_text


def run(config: PlantedConfig) -> Section:
    """Plant, try every method on every pair, and write tables, figure and page.

    Returns:
        The section of the page, with all tables.

    Raises:
        FrankenlensError: settings contradict each other, the models are no pair, or the data cannot be read.
    """
    check(config)
    pair = load_pair(config)
    try:
        section = measure(pair, config)
        publish([section], config, config.out, pair.provenance(), {"examples": config.n})
    finally:
        pair.close()
    return section


def check(config: PlantedConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_sound(config)
    chosen(config.methods)
    for kind in config.kinds:
        if kind not in KINDS:
            hint = nearest(kind, KINDS)
            raise FrankenlensError(f"--kinds has {kind!r}; choose of {', '.join(KINDS)}. {hint}".strip())
    if "named" in config.kinds and not config.components:
        raise FrankenlensError(
            "the kind named needs --components, such as blocks.3.mlp blocks.5.attn.head.1."
        )
    for name in ("pairs", "others", "nulls", "changed", "noise_pairs"):
        if not 1 <= getattr(config, name) < MOST:
            option = name.replace("_", "-")
            raise FrankenlensError(f"--{option} is {getattr(config, name)}; give 1 to {MOST - 1}.")
    if set(config.kinds) & set(TRAINED):
        require_triple(checkpoints(config)[0])


def measure(pair: Pair, config: PlantedConfig) -> Section:
    """All planted pairs, as a section of a page.

    Args:
        pair: IN and RL; as they were, afterwards.
        config: the settings. Finished pairs are kept in `config.out` and not made again.

    Raises:
        FrankenlensError: fewer components than `changed`, or none that RL changed where it should have.
    """
    garden, left_out = Garden(pair, config), {}
    kinds = [*config.kinds, *(["named"] if config.components and "named" not in config.kinds else [])]
    if "bf16" in kinds and all(on_grid(p) for p in pair.in_.model.parameters()):
        kinds.remove("bf16")
        left_out["pairs of kind bf16, as every weight of IN is a bfloat16 number already"] = config.nulls
    work = [(kind, i) for kind in kinds for i in range(config.pairs_of(kind))]
    noise = tqdm(range(config.noise_pairs), desc="noise pairs", unit="pair", delay=1)
    scores, effects = [], [pd.concat([garden.noise(i) for i in noise])]
    for kind, i in tqdm(work, desc="planted pairs", unit="pair", delay=1):
        found, own = garden.pair_of(kind, i)
        scores.append(found)
        effects.append(own)
    both = [pd.concat(some, ignore_index=True) for some in (scores, effects)]
    return section(both[0], both[1], config, left_out)


def section(
    scores: pd.DataFrame, effects: pd.DataFrame, config: PlantedConfig, left_out: Mapping[str, int]
) -> Section:
    """Tables, figure and finding from what was measured.

    Args:
        scores, effects: see `interp.planting.table.by_pair`.
        config: the settings.
        left_out: reason to number of pairs.
    """
    pairs = by_pair(scores, effects)
    found, null = found_table(pairs), null_table(pairs)
    figures = {"planted": plot_found(found, null, by_effect(scores, effects))}
    tables = {"planted": found, "planted_null": null, "planted_pairs": pairs, "plants": effects}
    account = _account(config, pairs, left_out)
    return Section(
        "planted", "Planted changes", finding(found, null), account, {**tables, "scores": scores}, figures
    )


def finding(found: pd.DataFrame, null: pd.DataFrame) -> str:
    """Every kind's methods by AUROC, what was invisible, and the claims on null pairs."""
    parts = []
    for kind in dict.fromkeys(found["kind"]):
        own = found.loc[found["kind"] == kind].sort_values("auroc", ascending=False)
        first = own.iloc[0]
        told = ", ".join(
            f"{row['method']} {interval_text(row['auroc'], row['auroc_low'], row['auroc_high'])}"
            for _, row in own.iterrows()
        )
        parts.append(
            f"{kind} ({first['n_pairs']} pairs, {first['n_invisible']} of {first['n_changed']} changed components "
            f"invisible): AUROC {told}"
        )
    some = null.dropna(subset="claimed")
    if len(some):
        worst = some.loc[some["claimed"].idxmax()]
        parts.append(
            f"null pairs with a claim: at most {worst['claimed']:.0%} ({worst['method']}, {worst['kind']}, n = "
            f"{worst['n_pairs']}); by tests alone, without the refusal of recoveries, at most "
            f"{some['tested'].max():.0%}"
        )
    return "; ".join(parts) + "."


def _account(config: PlantedConfig, pairs: pd.DataFrame, left_out: Mapping[str, int]) -> Account:
    definition = (
        "changes planted into a copy of IN, every other weight with Gaussian noise of the norm of rounding to bfloat16 "
        "(not in identical and bf16 pairs); soft metric over the copy's greedy text; score of a component: |mean "
        "effect| at all its tokens; AUROC: share of (changed, unchanged) couples in which the changed one scores "
        f"higher; invisible: alone it moves the output no more than 95 % of {config.noise_pairs} noise pairs do; "
        "intervals: bootstrap over pairs (95 %); claim: corrected p < 0.05 of a sign flip test over prompts and, for "
        "what moves something between the models, no refusal of recoveries"
    )
    if not pairs["tested"].any():
        definition += f" (with {config.n} prompts a pair no p can be small enough, so nothing is tested)"
    counts = pairs.groupby("kind", sort=False)["pair"].nunique()
    n = f"{config.n} prompts a pair; pairs: " + ", ".join(f"{kind} {count}" for kind, count in counts.items())
    holm = "Holm over the components of a pair, method by method"
    return Account(definition, n, holm, config.seed, left_out=left_out)
