"""The pairs of `frankenlens planted`: each is made once, tried by every method, and kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.retraining import plants
from experiments.retraining.triple import require_triple
from hooks import HookedVLM
from interp.pair.pair import Pair
from interp.planting import (
    MOST,
    TRAINED,
    VISIBILITY,
    WIRED,
    Draws,
    Method,
    Plant,
    effect_of_plant,
    marks,
    trial,
    wired,
)
from interp.questions.examples import Example

OTHER_PROMPTS = 50 * MOST
"""Added to a pair's seed for the prompts that say whether its plants can be seen: not those that methods look at."""


@dataclass(frozen=True, eq=False)
class PlantedPairs:
    """Makes planted pairs, and keeps what is finished.

    Attributes:
        pair: IN and RL; as they were, afterwards.
        draws: which plant each pair has.
        prompts: seed of a pair to what it is asked.
        methods: what is tried, by name.
        running: how the models are run: arguments of `interp.planting.trial`.
        in_path: IN, for plants that are trained.
        folder: of what is finished, named after everything that it depends on (`experiments.frame.finished`).
    """

    pair: Pair
    draws: Draws
    prompts: Callable[[int], Sequence[Example]]
    methods: Mapping[str, Method]
    running: Mapping[str, Any]
    in_path: str
    folder: Path

    def noise(self, i: int) -> pd.DataFrame:
        """How far a noise pair's output moves: one row, component ""."""
        plant = Plant(seed=self.draws.seed_of(VISIBILITY, i))
        file = self.folder / f"{VISIBILITY}-{i}.csv"
        if not file.is_file():
            effect = self._effect(self.pair.rl, plant)
            _write(pd.DataFrame([{"pair": f"{VISIBILITY} {i}", "component": "", "effect": effect}]), file)
        return _read_effects(file)

    def tried(self, kind: str, i: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What every method found on a pair, and the effect of each of its changed components alone.

        Raises:
            FrankenlensError: fewer components than are to change.
        """
        files = [self.folder / f"{kind}-{i}-{what}.csv" for what in ("plants", "scores")]
        if not files[1].is_file():
            effects, scores = self._try(kind, i)
            _write(effects, files[0])
            _write(scores, files[1])
        scores = pd.read_csv(files[1])
        return scores.assign(refused=scores["refused"].astype(object).fillna("")), _read_effects(files[0])

    def _try(self, kind: str, i: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        plant, among = self.draws.plant(kind, i), self.draws.among(kind)
        donor = self._donor(kind, i, plant)
        examples, label = self.prompts(plant.seed), f"{kind} {i}"
        rows = []
        try:
            for component in (one.name for one in among if plant.holds(one.name)):
                alone = replace(plant, components=(component,), noise="none", decoys=())
                effect = self._effect(donor, alone)
                rows.append({"pair": label, "component": component, "effect": effect})
            scores = trial(self.pair.in_, donor, plant, examples, self.methods, among, **self.running)
        finally:
            if donor is not self.pair.rl:
                donor.close()
        scores.insert(0, "pair", label)
        scores.insert(1, "kind", kind)
        return pd.DataFrame(rows, columns=["pair", "component", "effect"]), scores

    def marked(self, kind: str, i: int) -> pd.DataFrame:
        """The map's marks on a pair (`interp.planting.marks`)."""
        file = self.folder / f"{kind}-{i}-marks.csv"
        if not file.is_file():
            plant, among = self.draws.plant(kind, i), self.draws.among(kind)
            donor, examples = self._donor(kind, i, plant), self.prompts(plant.seed)
            try:
                found = marks(self.pair.in_, donor, plant, examples, among, **self.running)
            finally:
                if donor is not self.pair.rl:
                    donor.close()
            found.insert(0, "pair", f"{kind} {i}")
            found.insert(1, "kind", kind)
            _write(found, file)
        return read_marks(file)

    def _effect(self, donor: HookedVLM, plant: Plant) -> float:
        examples = self.prompts(plant.seed + OTHER_PROMPTS)
        return effect_of_plant(self.pair.in_, donor, plant, examples, **self.running)

    def _donor(self, kind: str, i: int, plant: Plant) -> HookedVLM:
        """RL, or IN with the plant trained or put together in it."""
        if kind in WIRED:
            prompts = [self.pair.builder.build(one) for one in self.prompts(plant.seed + OTHER_PROMPTS)]
            return wired(self.pair.in_, self.pair.rl, kind, plant.components, prompts, plant.seed)
        if kind not in TRAINED:
            return self.pair.rl
        folder, in_folder = self.folder / f"{kind}-{i}-model", require_triple(self.in_path)
        return plants.train_components(in_folder, plant.components, kind == "reinforced", plant.seed, folder)


def _write(table: pd.DataFrame, file: Path) -> None:
    """All or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    table.to_csv(temporary, index=False)
    os.replace(temporary, file)


def read_marks(file: Path) -> pd.DataFrame:
    """What `marked` wrote; cells of the sort "null" are no missing values."""
    numbers = ("effect", "random", "floor", "margin")
    return pd.read_csv(file, keep_default_na=False, na_values={key: ["", "nan"] for key in numbers})


def _read_effects(file: Path) -> pd.DataFrame:
    kept = {"pair": str, "component": str, "effect": float}
    return pd.read_csv(file, dtype=kept, keep_default_na=False)
