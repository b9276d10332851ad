"""All runs of a freezing experiment: trained what is not there yet, measured what is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.frame import is_first_process, require_begun_alike, steps
from experiments.retraining.arms import Arm
from experiments.retraining.recipe import Outcome, Recipe
from hooks import HookedVLM
from interp.freezing.losses import Retrained
from interp.regions import Partition


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is needed to train and measure.

    Attributes:
        partition: of the decoder.
        arms: the runs.
        recipe: how they are trained, and on what they are measured.
        n_frozen: run to its frozen weights.
        out: folder; a finished run is in `arms`, what a killed one goes on from in `unfinished`.
    """

    partition: Partition
    arms: tuple[Arm, ...]
    recipe: Recipe
    n_frozen: Mapping[str, int]
    out: Path

    @property
    def left_out(self) -> Mapping[str, int]:
        """Reason to number of questions left out."""
        return self.recipe.left_out

    def train(self) -> None:
        """Train every arm that is not in `out/arms` yet.

        Raises:
            FrankenlensError: `out` holds an arm of that name with other addresses or another seed.
        """
        finished, unfinished = self.out / "arms", self.out / "unfinished"
        finished.mkdir(parents=True, exist_ok=True)
        for arm in self.arms:
            (unfinished / arm.folder).mkdir(parents=True, exist_ok=True)
            frozen = {"addresses": list(arm.addresses), "seed": arm.trained_with}
            require_begun_alike(unfinished / arm.folder / "arm.json", frozen)
        waiting = [arm for arm in self.arms if not (finished / arm.folder).exists()]
        for arm in steps(waiting, "arms", "arm"):
            here = unfinished / arm.folder
            print(f"training {arm.name} (seed {arm.trained_with})", file=sys.stderr)
            self.recipe.train(arm.addresses, arm.trained_with, here, finished / arm.folder)
            if is_first_process():
                for checkpoint in here.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)

    def given(self, vlm: HookedVLM, name: str) -> Outcome:
        """A model as it is, on the questions."""
        return self.recipe.measure(vlm, self.out / "measured" / f"{name}.json")

    def measured(self) -> tuple[list[Retrained], dict[str, int]]:
        """Every arm on the questions, and reason to number of answers that are left out."""
        runs, left_out = [], {}
        for arm in self.arms:
            kept = self.out / "measured" / f"{arm.folder}.json"
            outcome = self.recipe.measure(self.out / "arms" / arm.folder, kept)
            if outcome.ungraded:
                left_out[f"{arm.folder}: answers that cannot be graded"] = outcome.ungraded
            frozen, size = ", ".join(arm.addresses), self.n_frozen[arm.name]
            right = outcome.right, outcome.unreadable
            runs.append(Retrained(arm.name, arm.kind, arm.seed, frozen, size, *right))
        return runs, left_out

    def groups(self) -> dict[str, list[int]]:
        """Group of questions to their places; the one that the finding is about comes first."""
        tasks = np.array(self.recipe.tasks)
        return {
            name: np.flatnonzero(np.isin(tasks, list(some))).tolist()
            for name, some in self.recipe.groups.items()
        }
