"""The pairs of `frankenlens planted`: what is planted where, on which prompts; made once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from experiments.retraining import plants
from experiments.retraining.triple import require_triple
from experiments.settings import DataSettings, PairSettings, checkpoints, load_examples
from hooks import FrankenlensError, HookedVLM
from interp.map.components import Component
from interp.pair.pair import Pair
from interp.planting import (
    DECODER,
    EVERYWHERE,
    METHODS,
    Plant,
    candidates,
    chosen,
    draw,
    effect_of_plant,
    relative_norm,
    trial,
)
from interp.questions.examples import Example, fingerprint
from interp.regions import NAMES, thirds

TRAINED = ("supervised", "reinforced")
NULLS = {"identical": "none", "bf16": "bf16", "noise": "gaussian"}
KINDS = {
    "rl": "heads and MLPs with RL's weights",
    "random": "heads and MLPs with a random update of RL's norm",
    "rotated": "heads and MLPs turned at random, at the norm of their weights",
    "decoys": "as rl, beside as many MLPs whose neurons are permuted, which changes nothing but weights",
    "supervised": "heads and MLPs trained by supervision, everything else frozen",
    "reinforced": "heads and MLPs trained by RL, everything else frozen",
    "layer": "all heads and the MLP of one layer with RL's weights",
    "region": "Early, Mid or Late with RL's weights",
    "vision": "a vision block with RL's weights",
    "identical": "nothing",
    "bf16": "nothing but IN rounded to bfloat16",
    "noise": "nothing but noise of the size of that rounding",
    "projector": "the projector with RL's weights",
    "named": "the components that --components names",
}
"""In an order that seeds depend on: a new kind comes last."""
FIRST = "rl"
"""The kind of which there are --pairs."""
MOST = 1000
"""Pairs of a kind that have seeds of their own."""


@dataclass(frozen=True)
class PlantedConfig(PairSettings, DataSettings):
    """Settings of the planted pairs; the defaults plant into the IN that ships with the package.

    Attributes:
        n: prompts of every pair, drawn anew for each.
        kinds: of rl, random, rotated, decoys, supervised, reinforced, layer, region, vision, projector; null pairs:
            identical, bf16, noise. supervised and reinforced train the embedded IN.
        components: addresses that change together, e.g. blocks.3.mlp blocks.5.attn.head.1; a kind of its own, named.
        change: of these: donor (RL's weights), random (an update of RL's norm) or rotated (at their own norm).
        pairs: pairs of kind rl.
        others: pairs of every other kind.
        nulls: pairs of each kind in which nothing was changed.
        changed: components that change, where they are drawn one by one; every other weight gets noise of the size
            of rounding.
        methods: which are tried; also "integrated gradients RL → IN" and "integrated gradients IN → RL".
        noise_pairs: noise pairs whose 95th percentile says from where on a plant is visible.
        max_new_tokens: longest generated text; the soft metric reads all of it.
        out: folder for scores.csv, plants.csv, the tables, the figure, report.html, and finished pairs.
    """

    n: int = 12
    kinds: tuple[str, ...] = (
        *("rl", "random", "rotated", "decoys", "layer", "region", "vision", "projector"),
        *NULLS,
    )
    components: tuple[str, ...] = ()
    change: Literal["donor", "random", "rotated"] = "donor"
    pairs: int = 10
    others: int = 8
    nulls: int = 8
    changed: int = 3
    methods: tuple[str, ...] = tuple(METHODS)
    noise_pairs: int = 40
    max_new_tokens: int = 24
    out: Path = Path("out/planted")

    def pairs_of(self, kind: str) -> int:
        """How many pairs of a kind are made."""
        return self.pairs if kind == FIRST else self.nulls if kind in NULLS else self.others


class Garden:
    """Makes planted pairs, and keeps what is finished in a folder named after everything that it depends on."""

    def __init__(self, pair: Pair, config: PlantedConfig) -> None:
        """Args:
        pair: IN and RL.
        config: the settings.
        """
        self.pair, self.config = pair, config
        self.methods = chosen(config.methods)
        self.folder = config.out / "finished" / self._fingerprint()

    def noise(self, i: int) -> pd.DataFrame:
        """How far a noise pair's output moves: one row, component ""."""
        plant = Plant(seed=self._seed("visibility", i))
        file = self.folder / f"visibility-{i}.csv"
        if not file.is_file():
            examples, in_ = self._examples(plant.seed), self.pair.in_
            effect = effect_of_plant(in_, self.pair.rl, plant, examples, **self._settings)
            _write(pd.DataFrame([{"pair": f"visibility {i}", "component": "", "effect": effect}]), file)
        return _read_effects(file)

    def pair_of(self, kind: str, i: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What every method found on a pair, and the effect of each of its changed components alone."""
        files = [self.folder / f"{kind}-{i}-{what}.csv" for what in ("plants", "scores")]
        if not files[1].is_file():
            effects, scores = self._try(kind, i)
            _write(effects, files[0])
            _write(scores, files[1])
        scores = pd.read_csv(files[1])
        return scores.assign(refused=scores["refused"].astype(object).fillna("")), _read_effects(files[0])

    def plant(self, kind: str, i: int) -> tuple[Plant, list[Component]]:
        """The i-th plant of a kind, and what the methods choose among.

        Raises:
            FrankenlensError: fewer components than are to change.
        """
        in_, seed, k = self.pair.in_, self._seed(kind, i), self.config.changed
        early = kind in ("vision", "projector") or (kind == "named" and self._names_vision)
        among = candidates(in_, EVERYWHERE if early else DECODER)
        if kind in NULLS:
            return Plant(noise=NULLS[kind], seed=seed), among
        if kind == "named":
            return Plant(self.config.components, self.config.change, seed=seed), among
        if kind in ("layer", "region", "vision", "projector"):
            return Plant((self._whole(kind, i),), seed=seed), among
        free = among if kind in ("rotated", *TRAINED) else self._moved
        if k >= len(free):
            what = "components to choose from" if free is among else "components that RL moved"
            raise FrankenlensError(f"--changed is {k}, but there are only {len(free)} {what}.")
        names = draw(free, k, seed)
        change = kind if kind in ("random", "rotated") else "donor"
        decoys = self._decoys(names, seed) if kind == "decoys" else ()
        return Plant(names, change, decoys=decoys, seed=seed), among

    def _whole(self, kind: str, i: int) -> str:
        """A layer, region, vision block or projector, by address."""
        in_, rng = self.pair.in_, random.Random(self._seed(kind, i))
        if kind == "region":
            return thirds(in_.n_layers).address(NAMES[i % len(NAMES)])
        if kind == "vision":
            return f"vision.blocks.{rng.randrange(len(in_.anatomy.vision.blocks))}"
        return kind if kind == "projector" else f"blocks.{rng.randrange(in_.n_layers)}"

    def _try(self, kind: str, i: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        plant, among = self.plant(kind, i)
        donor = self._donor(kind, i, plant)
        examples, in_, label = self._examples(plant.seed), self.pair.in_, f"{kind} {i}"
        rows = []
        try:
            for component in (one.name for one in among if plant.holds(one.name)):
                alone = replace(plant, components=(component,), noise="none", decoys=())
                effect = effect_of_plant(in_, donor, alone, examples, **self._settings)
                rows.append({"pair": label, "component": component, "effect": effect})
            scores = trial(in_, donor, plant, examples, self.methods, among, **self._settings)
        finally:
            if donor is not self.pair.rl:
                donor.close()
        scores.insert(0, "pair", label)
        scores.insert(1, "kind", kind)
        return pd.DataFrame(rows, columns=["pair", "component", "effect"]), scores

    def _decoys(self, names: Sequence[str], seed: int) -> tuple[str, ...]:
        free = [f"blocks.{i}.mlp" for i in range(self.pair.in_.n_layers) if f"blocks.{i}.mlp" not in names]
        return tuple(random.Random(seed).sample(free, min(len(names), len(free))))

    def _donor(self, kind: str, i: int, plant: Plant) -> HookedVLM:
        if kind not in TRAINED:
            return self.pair.rl
        folder = self.folder / f"{kind}-{i}-model"
        in_folder = require_triple(checkpoints(self.config)[0])
        return plants.train_components(in_folder, plant.components, kind == "reinforced", plant.seed, folder)

    def _examples(self, seed: int) -> list[Example]:
        if self.config.data is None:
            return load_examples(self.config, seed)[0]
        return random.Random(seed).sample(self._own, min(self.config.n, len(self._own)))

    @cached_property
    def _own(self) -> list[Example]:
        """All rows of the user's data."""
        return load_examples(replace(self.config, n=1_000_000), 0)[0]

    @cached_property
    def _moved(self) -> list[Component]:
        """Heads and MLPs that RL changed at all."""
        every = candidates(self.pair.in_, DECODER)
        return [one for one in every if relative_norm(self.pair.in_, self.pair.rl, one.name) > 0]

    @property
    def _names_vision(self) -> bool:
        return any(one == "projector" or one.startswith("vision") for one in self.config.components)

    def _seed(self, kind: str, i: int) -> int:
        """Differs between kinds and pairs, and does not move when others are left out."""
        kinds = ("visibility", *KINDS)
        return 100 * MOST * (self.config.seed + 1) + MOST * kinds.index(kind) + i

    @property
    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "max_new_tokens": config.max_new_tokens,
            "batch_size": config.batch_size,
            "trace_format": self.pair.trace_format,
        }

    def _fingerprint(self) -> str:
        config = self.config
        about = {
            "models": {name: one["weights_sha256"] for name, one in self.pair.provenance().items()},
            "methods": list(config.methods),
            "settings": [str(getattr(config, name)) for name in ("n", "changed", "seed", "dtype")],
            "named": [config.components, config.change],
            "text": [config.max_new_tokens, repr(self.pair.trace_format), str(self.pair.builder.template)],
            "training": repr((plants.SUPERVISED, plants.REINFORCED)),
            "questions": None if config.data is None else sorted(map(fingerprint, self._own)),
            "version": version("frankenlens"),
        }
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _write(table: pd.DataFrame, file: Path) -> None:
    """All or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    table.to_csv(temporary, index=False)
    os.replace(temporary, file)


def _read_effects(file: Path) -> pd.DataFrame:
    kept = {"pair": str, "component": str, "effect": float}
    return pd.read_csv(file, dtype=kept, keep_default_na=False)
