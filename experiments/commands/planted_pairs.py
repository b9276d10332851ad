"""The pairs of `frankenlens planted`: each is made once, tried by every method, and kept."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from experiments.retraining import plants
from experiments.retraining.triple import require_triple
from hooks import FrankenlensError, HookedVLM
from interp.pair import greedy
from interp.pair.pair import Pair, weights_sha256
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
from interp.prompts import Prompt
from interp.questions.examples import Example
from interp.results.store import Store

OTHER_PROMPTS = 50 * MOST
"""Added to a pair's seed for the prompts that say whether its plants can be seen: not those that methods look at."""
FITTED_TO = tuple(OTHER_PROMPTS + 100 * MOST * MOST * i for i in range(1, 5))
"""Likewise, for the prompts that donors are put together on."""


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
        keep: where it is kept what is finished, in a folder named after everything that it depends on.
    """

    pair: Pair
    draws: Draws
    prompts: Callable[[int], Sequence[Example]]
    methods: Mapping[str, Method]
    running: Mapping[str, Any]
    in_path: str
    keep: Store

    def noise(self, i: int) -> pd.DataFrame:
        """How far a noise pair's output moves: one row, component ""."""
        plant = Plant(seed=self.draws.seed_of(VISIBILITY, i))

        def measure() -> pd.DataFrame:
            effect = self._effect(self.pair.rl, plant)
            return pd.DataFrame([{"pair": f"{VISIBILITY} {i}", "component": "", "effect": effect}])

        return self.keep.part(f"{VISIBILITY}-{i}", measure)

    def tried(self, kind: str, i: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What every method found on a pair, and the effect of each of its changed components alone.

        Raises:
            FrankenlensError: fewer components than are to change.
        """
        effects, scores = self.keep.part(f"{kind}-{i}", lambda: self._try(kind, i))
        return scores, effects.astype({"pair": str, "component": str, "effect": float})

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

        def measure() -> pd.DataFrame:
            plant, among = self.draws.plant(kind, i), self.draws.among(kind)
            donor, examples = self._donor(kind, i, plant), self.prompts(plant.seed)
            try:
                found = marks(self.pair.in_, donor, plant, examples, among, **self.running)
            finally:
                if donor is not self.pair.rl:
                    donor.close()
            found.insert(0, "pair", f"{kind} {i}")
            found.insert(1, "kind", kind)
            return found

        return self.keep.part(f"{kind}-{i}-marks", measure)

    def _effect(self, donor: HookedVLM, plant: Plant) -> float:
        examples = self.prompts(plant.seed + OTHER_PROMPTS)
        return effect_of_plant(self.pair.in_, donor, plant, examples, **self.running)

    def _continued(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """With what IN writes after them."""
        text = greedy(self.pair.in_, prompts, self.running["max_new_tokens"], self.running["batch_size"])
        return [prompt.with_tokens(ids) for prompt, ids in zip(prompts, text, strict=True)]

    def _donor(self, kind: str, i: int, plant: Plant) -> HookedVLM:
        """RL, or IN with the plant trained or put together in it."""
        if kind in WIRED:
            some = [one for more in FITTED_TO for one in self.prompts(plant.seed + more)]
            prompts = self._continued([self.pair.builder.build(one) for one in some])
            return wired(self.pair.in_, self.pair.rl, kind, plant.components, prompts, plant.seed)
        if kind not in TRAINED:
            return self.pair.rl
        folder, in_folder = self.keep.folder / f"{kind}-{i}-model", require_triple(self.in_path)

        def trained() -> HookedVLM:
            rl = kind == "reinforced"
            return plants.train_components(in_folder, plant.components, rl, plant.seed, folder)

        known = self.keep.load(folder.name)
        try:
            vlm = trained()
            sound = known is None or weights_sha256(vlm.model) == known
        except FrankenlensError:
            if known is None:
                raise
            vlm, sound = None, False
        if vlm is None or not sound:
            warnings.warn(f"{folder} is damaged and is made again", stacklevel=2)
            shutil.rmtree(folder)
            vlm = trained()
        self.keep.save(folder.name, weights_sha256(vlm.model))
        return vlm
