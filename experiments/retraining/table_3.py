"""RL once more on a user's own questions, measured as Table 3 of 2602.12395 is: M_vis, M_v2r and M_rea."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.papers import ASKED
from experiments.retraining.own import OwnRecipe
from experiments.retraining.recipe import Outcome
from hooks import HookedVLM
from interp.fine_grained import table_2_metrics
from interp.fine_grained.paper import DESCRIBED
from interp.questions.examples import Example, cluster_of


@dataclass(frozen=True, eq=False)
class PaperRecipe(OwnRecipe):
    """`OwnRecipe`, measured on the paper's questions; what counts as a question here is one of one metric.

    Attributes:
        asked: metric to its questions, described where it needs that.
    """

    asked: Mapping[str, Sequence[Example]]

    @property
    def definition(self) -> str:
        """In words."""
        trained = super().definition.partition("; greedy")[0]
        return (
            f"the paper: {trained}; measured: M_vis, right with the image and wrong with a black one; M_v2r, right "
            "with the image and right with a black one and a description; M_rea, right on text alone; accuracy, right "
            f"as the question is asked; {ASKED}"
        )

    @property
    def tasks(self) -> list[str]:
        """The metric of every question, and once more for its accuracy."""
        metrics = [f"M_{name}" for name, some in self.asked.items() for _ in some]
        return [*metrics, *(f"accuracy, {name}" for name in metrics)]

    @property
    def clusters(self) -> list[str]:
        """See `Recipe`."""
        return 2 * [cluster_of(example) for some in self.asked.values() for example in some]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Every metric, then the accuracy of its questions."""
        return {name: (name,) for name in dict.fromkeys(self.tasks)}

    def measure(self, checkpoint: Path | HookedVLM, kept: Path) -> Outcome:
        """See `Recipe`."""
        questions = {name: [example.id for example in some] for name, some in self.asked.items()}
        record = self.recorded(checkpoint, kept, questions, self._metrics)
        right, why = np.array(record["right"], dtype=float), np.array(record["why"], dtype=object)
        counted = ~np.isnan(right)  # what was left out was no reply
        return Outcome(right, float(np.mean(why[counted] != "")) if counted.any() else np.nan)

    def _metrics(self, vlm: HookedVLM) -> dict[str, Any]:
        metrics = table_2_metrics(
            self.builder,
            self.asked,
            template=DESCRIBED,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        found = metrics.measure(vlm).values()
        right = [None if np.isnan(one) else one for each in found for one in each.right]
        return {"right": right, "why": [reason for each in found for reason in each.why]}
