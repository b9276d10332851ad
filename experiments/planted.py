"""Which localizing method finds what was hidden, and claims nothing where nothing is? Pairs with a known change.

`frankenlens planted` is the command; the pieces are in `interp.planting`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from experiments.retraining.plants import train_components
from experiments.retraining.triple import require_triple
from experiments.settings import (
    DataSettings,
    PairSettings,
    checkpoints,
    load_examples,
    load_pair,
    publish,
    require_sound,
)
from hooks import HookedVLM
from hooks.errors import FrankenlensError, nearest
from interp.examples import Example
from interp.page import Account, Section
from interp.pair import Pair
from interp.patching import Component
from interp.planting import (
    DECODER,
    EVERYWHERE,
    METHODS,
    Plant,
    candidates,
    chosen,
    draw,
    effect_of_plant,
    trial,
)
from interp.planting.plots import plot_found
from interp.planting.table import by_effect, by_pair, found_table, null_table
from interp.regions import NAMES, thirds

TRAINED = ("supervised", "reinforced")
NULLS = ("identical", "bf16", "noise")
KINDS = {
    "rl": "heads and MLPs with RL's weights",
    "random": "heads and MLPs with a random update of RL's norm",
    "rotated": "heads and MLPs turned at random, at the norm of their weights",
    "decoys": "as rl, beside as many MLPs whose neurons are permuted, which changes nothing but weights",
    "supervised": "heads and MLPs trained by supervision, everything else frozen",
    "reinforced": "heads and MLPs trained by RL, everything else frozen",
    "layer": "all heads and the MLP of one layer with RL's weights",
    "region": "Early, Mid or Late with RL's weights",
    "vision": "a vision block or the projector with RL's weights",
    "identical": "nothing",
    "bf16": "nothing but IN rounded to bfloat16",
    "noise": "nothing but noise of the size of that rounding",
}
FIRST = "rl"  # the kind of which there are --pairs


@dataclass(frozen=True)
class PlantedConfig(PairSettings, DataSettings):
    """Settings of the planted pairs; the defaults plant into the IN that ships with the package.

    Attributes:
        n: prompts of every pair, drawn anew for each.
        kinds: of rl, random, rotated, decoys, supervised, reinforced, layer, region, vision; null pairs: identical,
            bf16, noise. supervised and reinforced train the embedded IN.
        pairs: pairs of kind rl.
        others: pairs of every other kind.
        changed: components that change, where they are drawn one by one; every other weight gets noise of the size
            of rounding.
        methods: which are tried; also "integrated gradients RL → IN" and "integrated gradients IN → RL".
        noise_pairs: noise pairs whose 95th percentile says from where on a plant is visible.
        max_new_tokens: longest generated text; the soft metric reads all of it.
        out: folder for scores.csv, plants.csv, the tables, the figure, report.html, and finished pairs.
    """

    n: int = 12
    kinds: tuple[str, ...] = ("rl", "random", "rotated", "decoys", "layer", "region", "vision", *NULLS)
    pairs: int = 10
    others: int = 5
    changed: int = 3
    methods: tuple[str, ...] = tuple(METHODS)
    noise_pairs: int = 40
    max_new_tokens: int = 24
    out: Path = Path("out/planted")


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
    for name in ("pairs", "others", "changed", "noise_pairs"):
        if getattr(config, name) < 1:
            raise FrankenlensError(f"--{name.replace('_', '-')} is {getattr(config, name)}; give at least 1.")
    if set(config.kinds) & set(TRAINED):
        require_triple(checkpoints(config)[0])


def measure(pair: Pair, config: PlantedConfig) -> Section:
    """All planted pairs, as a section of a page.

    Args:
        pair: IN and RL; as they were, afterwards.
        config: the settings. Finished pairs are kept in `config.out` and not made again.

    Raises:
        FrankenlensError: fewer components than `changed`.
    """
    garden = Garden(pair, config)
    work = [
        (kind, i) for kind in config.kinds for i in range(config.pairs if kind == FIRST else config.others)
    ]
    kept = [
        garden.noise(i) for i in tqdm(range(config.noise_pairs), desc="noise pairs", unit="pair", delay=1)
    ]
    scores, plants = [], [pd.concat(kept)]
    for kind, i in tqdm(work, desc="planted pairs", unit="pair", delay=1):
        found, own = garden.pair_of(kind, i)
        scores.append(found)
        plants.append(own)
    return section(pd.concat(scores, ignore_index=True), pd.concat(plants, ignore_index=True), config)


def section(scores: pd.DataFrame, plants: pd.DataFrame, config: PlantedConfig) -> Section:
    """Tables, figure and finding from what was measured.

    Args:
        scores, plants: see `interp.planting.table.by_pair`.
        config: the settings.
    """
    pairs = by_pair(scores, plants)
    found, null = found_table(pairs), null_table(pairs)
    alone = by_effect(scores, plants)
    tables = {
        "planted": found,
        "planted_null": null,
        "planted_pairs": pairs,
        "plants": plants,
        "scores": scores,
    }
    figures = {"planted": plot_found(found, null, alone)}
    return Section("planted", "Planted changes", finding(found, null), _account(config), tables, figures)


def finding(found: pd.DataFrame, null: pd.DataFrame) -> str:
    """The methods by AUROC on the first kind, what was invisible, and the claims on null pairs."""
    parts = []
    for kind in dict.fromkeys(found["kind"]):
        own = found.loc[found["kind"] == kind].sort_values("auroc", ascending=False)
        first = own.iloc[0]
        told = ", ".join(f"{row['method']} {row['auroc']:.2f}" for _, row in own.iterrows())
        parts.append(
            f"{kind} ({first['n_pairs']} pairs, {first['n_invisible']} of {first['n_changed']} changed components "
            f"invisible): AUROC {told}"
        )
    some = null.dropna(subset="claimed")
    if len(some):
        worst = some.loc[some["claimed"].idxmax()]
        parts.append(
            f"null pairs with a claim: at most {worst['claimed']:.0%} ({worst['method']}, {worst['kind']}, n = "
            f"{worst['n_pairs']})"
        )
    return "; ".join(parts) + "."


class Garden:
    """Makes planted pairs, and keeps what is finished."""

    def __init__(self, pair: Pair, config: PlantedConfig) -> None:
        self.pair, self.config = pair, config
        self.methods = chosen(config.methods)
        self.folder = config.out / "finished" / self._fingerprint()

    def noise(self, i: int) -> pd.DataFrame:
        """How far a noise pair's output moves: one row, component ""."""
        plant = Plant(seed=self._seed("visibility", i))
        file = self.folder / f"visibility-{i}.csv"
        if not file.is_file():
            effect = effect_of_plant(
                self.pair.in_, self.pair.rl, plant, self._examples(plant.seed), **self._settings
            )
            _write(pd.DataFrame([{"pair": f"visibility {i}", "component": "", "effect": effect}]), file)
        return pd.read_csv(file, keep_default_na=False)

    def pair_of(self, kind: str, i: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What every method found on a pair, and the effect of each of its changed components alone."""
        files = [self.folder / f"{kind}-{i}-{what}.csv" for what in ("plants", "scores")]
        if not files[1].is_file():
            plants, scores = self._try(kind, i)
            _write(plants, files[0])
            _write(scores, files[1])
        plants = pd.read_csv(files[0], keep_default_na=False)
        scores = pd.read_csv(files[1])
        return scores.assign(refused=scores["refused"].fillna("")), plants

    def _try(self, kind: str, i: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        plant, among = self.plant(kind, i)
        donor = self._donor(kind, i, plant)
        examples, in_ = self._examples(plant.seed), self.pair.in_
        label = f"{kind} {i}"
        rows = []
        for component in (one.name for one in among if plant.holds(one.name)):
            alone = replace(plant, components=(component,), noise="none", decoys=())
            effect = effect_of_plant(in_, donor, alone, examples, **self._settings)
            rows.append({"pair": label, "component": component, "effect": effect})
        scores = trial(in_, donor, plant, examples, self.methods, among, **self._settings)
        scores.insert(0, "pair", label)
        scores.insert(1, "kind", kind)
        if donor is not self.pair.rl:
            donor.close()
        return pd.DataFrame(rows, columns=["pair", "component", "effect"]), scores

    def plant(self, kind: str, i: int) -> tuple[Plant, list[Component]]:
        """The i-th plant of a kind, and what the methods choose among."""
        in_, seed, k = self.pair.in_, self._seed(kind, i), self.config.changed
        among = candidates(in_, EVERYWHERE if kind == "vision" else DECODER)
        if k >= len(among):
            raise FrankenlensError(
                f"--changed is {k}, but there are only {len(among)} components to choose from."
            )
        if kind in NULLS:
            return Plant(
                noise={"identical": "none", "bf16": "bf16", "noise": "gaussian"}[kind], seed=seed
            ), among
        if kind == "layer":
            return Plant((f"blocks.{i % in_.n_layers}",), seed=seed), among
        if kind == "region":
            return Plant((thirds(in_.n_layers).address(NAMES[i % len(NAMES)]),), seed=seed), among
        if kind == "vision":
            early = [one for one in among if one.point not in DECODER]
            return Plant((early[i % len(early)].name,), seed=seed), among
        names = draw(among, k, seed)
        change = kind if kind in ("random", "rotated") else "donor"
        return Plant(
            names, change, decoys=self._decoys(names, seed) if kind == "decoys" else (), seed=seed
        ), among

    def _decoys(self, names: Sequence[str], seed: int) -> tuple[str, ...]:
        free = [f"blocks.{i}.mlp" for i in range(self.pair.in_.n_layers) if f"blocks.{i}.mlp" not in names]
        return tuple(random.Random(seed).sample(free, min(len(names), len(free))))

    def _donor(self, kind: str, i: int, plant: Plant) -> HookedVLM:
        if kind not in TRAINED:
            return self.pair.rl
        folder = self.folder / f"{kind}-{i}-model"
        in_folder = require_triple(checkpoints(self.config)[0])
        return train_components(in_folder, plant.components, kind == "reinforced", plant.seed, folder)

    def _examples(self, seed: int) -> list[Example]:
        if self.config.data is None:
            return load_examples(self.config, seed)[0]
        return random.Random(seed).sample(self._own, min(self.config.n, len(self._own)))

    @cached_property
    def _own(self) -> list[Example]:
        return load_examples(replace(self.config, n=1_000_000), 0)[0]

    def _seed(self, kind: str, i: int) -> int:
        """Differs between kinds and pairs, and does not move when others are left out."""
        kinds = ("visibility", *KINDS)
        return 100_000 * (self.config.seed + 1) + 1_000 * kinds.index(kind) + i

    @property
    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "max_new_tokens": config.max_new_tokens,
            "batch_size": config.batch_size,
            "trace_format": self.pair.trace_format,
        }

    def _fingerprint(self) -> str:
        """Of what a finished pair depends on, the models' weights included."""
        config = self.config
        about = {
            "models": {name: one["weights_sha256"] for name, one in self.pair.provenance().items()},
            "methods": list(config.methods),
            "settings": [str(getattr(config, name)) for name in ("n", "changed", "data", "images", "seed")],
            "run": [config.max_new_tokens, config.dtype, config.reasoning, config.answer],
        }
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _account(config: PlantedConfig) -> Account:
    definition = (
        "changes planted into a copy of IN, every other weight with Gaussian noise of the norm of rounding to bfloat16 "
        "(not in identical and bf16 pairs); soft metric over the copy's greedy text; score of a component: |mean "
        "effect| at all its tokens; AUROC: share of (changed, unchanged) couples in which the changed one scores "
        f"higher; invisible: alone it moves the output no more than 95 % of {config.noise_pairs} noise pairs do; "
        "intervals: bootstrap over pairs (95 %); claim: corrected p < 0.05 of a sign flip test over prompts and, for "
        "what moves something between the models, no refusal of recoveries"
    )
    counts = Counter({kind: config.pairs if kind == FIRST else config.others for kind in config.kinds})
    n = f"{config.n} prompts a pair; pairs: " + ", ".join(f"{kind} {count}" for kind, count in counts.items())
    return Account(definition, n, "Holm over the components of a pair, method by method", config.seed)


def _write(table: pd.DataFrame, file: Path) -> None:
    """All or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    table.to_csv(temporary, index=False)
    os.replace(temporary, file)
