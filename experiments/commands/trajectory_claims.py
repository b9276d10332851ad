"""Claims put to the test at every step of a run, on the decisions that the run is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from hooks.errors import FrankenlensError
from hooks.whereabouts import require_file
from interp.decision import DecisionSet
from interp.hypotheses import read_claims, verdict_table
from interp.hypotheses.held_out import origins, population_of
from interp.hypotheses.judge import judge
from interp.hypotheses.measure import measure, resolved
from interp.map.clean import CleanRuns
from interp.metrics import evaluate
from interp.pair.pair import Pair
from interp.pair.trajectory import Step
from interp.questions.examples import cluster_of


def require_claims(path: Path | None) -> None:
    """Refuse a file that is not there, and claims that are not of decisions.

    Raises:
        FrankenlensError: names the file, or the claim.
    """
    if path is None:
        return
    require_file(path, "a YAML file of claims", "--claims")
    for claim in read_claims(path).claims:
        if claim.quantity == "accuracy":
            raise FrankenlensError(
                f"{path}: claim {claim.name!r} is of accuracy, for which both models would answer anew at every step; "
                "put it to the test on single checkpoints (frankenlens test --pairs)."
            )


class StepClaims:
    """A family of claims over the steps of a run.

    Attributes:
        definition, correction: for the account.
    """

    def __init__(self, config: Any) -> None:
        self._config, self._family = config, read_claims(config.claims)
        self._tables: dict[int, pd.DataFrame] = {}
        self._clean: CleanRuns | None = None
        self.definition = (
            "claims: one-sided paired tests on the decisions of all steps, a recovery being a share of the step's own "
            "RL − IN; every step is a test of its own, and these looks are in no ledger"
        )
        self.correction = f"{self._family.correction} over {len(self._family.claims)} claims, for each step"

    def look(self, step: Step, pair: Pair, decisions: DecisionSet) -> None:
        """Test the family on one step.

        Raises:
            FrankenlensError: a component that the models do not have, or claims found on these prompts.
        """
        config = self._config
        claims, examples = resolved(self._family, pair.in_), list(decisions.examples)
        origin = origins(self._family, examples, config.allow_reuse)
        values = evaluate(pair.rl, decisions.prompts, decisions.metric, config.batch_size)
        own = replace(decisions, rl_values=values)
        if self._clean is None:
            self._clean = CleanRuns(pair.in_)
        settings = {**config.running, "seed": config.seed, "clean": self._clean}
        measured = measure(pair, claims, examples, own, **settings)
        clusters = [cluster_of(example) for example in examples]
        found = judge(self._family, claims, measured, origin, clusters=clusters, seed=config.seed)
        verdicts = [replace(one, population=population_of(examples)) for one in found]
        self._tables[step.number] = verdict_table(verdicts).drop(columns="pair").assign(step=step.number)

    def table(self) -> pd.DataFrame:
        """One row per step and claim."""
        return pd.concat([self._tables[step] for step in sorted(self._tables)], ignore_index=True)

    def finding(self) -> Iterator[str]:
        """Each claim's verdicts in the order of the steps."""
        for claim, rows in self.table().groupby("claim", sort=False):
            told = ", ".join(f"{v} at step {s}" for v, s in zip(rows["verdict"], rows["step"], strict=True))
            yield f"Claim {claim!r}: {told}."
