"""A family of claims put to the test on a pair: decisions found, components and controls moved, verdicts given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xarray as xr

from hooks.errors import FrankenlensError
from interp.decision import DecisionSet, find_decisions, null_pair_denominator, recovery_refused
from interp.hypotheses.claim import Family
from interp.hypotheses.held_out import origins, population_of
from interp.hypotheses.judge import Verdict, judge
from interp.hypotheses.ledger import Ledger
from interp.hypotheses.measure import Measured, measure, resolved
from interp.pair.pair import Pair, weights_sha256
from interp.questions.examples import Example, cluster_of, once_each

SAME = "IN and RL hold the same weights, so there is nothing to move"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a family came to on one pair.

    Attributes:
        verdicts: in the order of the family.
        examples: on which it was tested.
        decisions: what was measured there; None where no claim needed any, or nothing could be.
        measured: by claim, per example.
        left_out: reason to number of examples given that did not test it.
    """

    verdicts: tuple[Verdict, ...]
    examples: tuple[Example, ...]
    decisions: DecisionSet | None
    measured: dict[str, Measured]
    left_out: dict[str, int] = field(default_factory=dict)

    def dataset(self) -> xr.Dataset:
        """effect, control and total [claim example], NaN where there is no value."""
        names = list(self.measured)
        columns = {
            key: (("claim", "example"), [getattr(self.measured[name], key) for name in names])
            for key in ("effect", "control", "total")
        }
        coords: dict[str, Any] = {"claim": names, "example": [e.id for e in self.examples]}
        coords["cluster"] = ("example", [cluster_of(e) for e in self.examples])
        units = ("claim", [self.measured[name].units for name in names])
        return xr.Dataset(columns if names else {}, coords={**coords, "units": units})


def put_to_test(
    pair: Pair,
    family: Family,
    examples: Sequence[Example],
    *,
    allow_reuse: bool = False,
    ledger: Ledger | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Outcome:
    """Test a family of claims on examples.

    Args:
        pair: IN and RL; as they were, afterwards.
        family: registered before the examples were seen.
        examples: held out. A question that is asked again under another id is left out; examples of one cluster
            (`interp.questions.examples.cluster_of`: one image) count as one where independence matters.
        allow_reuse: also test claims on examples that they were found on, marked exploratory.
        ledger: where looks at claims are kept and counted; None: this one counts as the first.
        max_new_tokens, batch_size: of what is run.
        seed: of random updates, null pairs, intervals and power.
        progress: bars.

    Raises:
        FrankenlensError: before anything runs: a component that the models do not have; a claim that was found on
            these examples, unless `allow_reuse`.
    """
    if not examples:
        raise FrankenlensError("claims are tested on examples; there are none")
    claims = resolved(family, pair.in_)
    origin = origins(family, examples, allow_reuse)
    examples, twice = once_each(examples)
    left_out = {"asked already, under another id": twice} if twice else {}
    weights = tuple(weights_sha256(one.model) for one in (pair.in_, pair.rl))
    if weights[0] == weights[1]:
        verdicts = judge(family, claims, {}, origin, dict.fromkeys(claims, SAME))
        return Outcome(tuple(verdicts), tuple(examples), None, {}, left_out)
    # what was found on these very prompts is no test of it, and confirms nothing later
    tests = {name: claim for name, claim in claims.items() if origin[name] != "exploratory"}
    looks = None if ledger is None else ledger.looks(" ".join(weights), family, tests, examples)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    decisions, refused = None, {}
    needing = [claim for claim in claims.values() if claim.quantity != "accuracy"]
    if needing:
        decisions = find_decisions(pair, examples, family.decision, **settings, progress=progress)
        if not len(decisions):
            why = "; ".join(f"{n}: {reason}" for reason, n in decisions.excluded.items())
            none = f"no prompt has the decision {family.decision!r} ({why}); {decisions.ways_on}"
            refused = dict.fromkeys((claim.name for claim in needing), none)
            decisions = None
        elif any(claim.quantity == "recovery" for claim in needing):
            reason = recovery_refused(decisions, null_pair_denominator(pair, decisions, seed, batch_size))
            refused = {c.name: reason for c in needing if c.quantity == "recovery" and reason}
    measured = measure(pair, claims, examples, decisions, **settings, seed=seed, progress=progress)
    clusters = [cluster_of(example) for example in examples]
    found = judge(family, claims, measured, origin, refused, clusters=clusters, looks=looks, seed=seed)
    verdicts = [replace(one, population=population_of(examples)) for one in found]
    if ledger is not None:
        said = {one.claim.name: one.verdict for one in verdicts if one.claim.name in tests}
        ledger.write(" ".join(weights), family, tests, examples, said)
    return Outcome(tuple(verdicts), tuple(examples), decisions, measured, left_out)
