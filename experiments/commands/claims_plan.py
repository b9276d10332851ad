"""What `frankenlens test` takes, counted from its settings and not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.bench import Bench, PlanSettings
from experiments.settings import checkpoints
from interp.hypotheses import Family, read_claims
from interp.hypotheses.measure import moved_by_body, with_addresses
from interp.plan import claims
from interp.plan import decisions as plans
from interp.plan.structure import Weightless, weightless
from interp.plan.work import Work


def structure(config: Any, settings: PlanSettings) -> Weightless:
    """Of the first pair's IN."""
    first = config.pairs[0][0] if config.pairs else checkpoints(config)[0]
    return weightless(first, config.dtype, settings.on)


def work(bench: Bench, config: Any) -> Iterator[Work]:
    """Its steps, of all pairs."""
    for one in _of_one_pair(bench, config, _family(bench, config)):
        yield one.times(max(1, len(config.pairs)))


def _of_one_pair(bench: Bench, config: Any, family: Family) -> Iterator[Work]:
    asked, runs, choice = bench.workload, bench.runs(), family.decision
    wanted = [with_addresses(claim, family.partition, bench.vlm) for claim in family.claims]
    needing, parts = [one for one in wanted if one.quantity != "accuracy"], moved_by_body(wanted)
    some, reads = asked.traces if choice == "soft" else asked.cut, plans.reads_of(choice)
    share = asked.scale * (1.0 if choice == "soft" else asked.decided)
    if needing:
        for one in plans.found_decisions(runs, asked, choice):
            yield one.times(asked.scale)
    if any(one.quantity == "recovery" for one in needing):
        yield plans.null_pairs(runs, asked, choice).times(asked.scale)
    if parts["activation"]:
        moved = claims.activations(runs, some, reads, parts["activation"], bench.at_tokens)
        yield moved.times(share)
    if parts["weights"]:
        yield plans.set_aside(claims.weights(runs, some, reads, parts["weights"]), runs).times(share)
    if parts["accuracy"]:
        answers = claims.accuracies(runs, asked.prompts, bench.trace_tokens, parts["accuracy"])
        yield plans.set_aside(answers, runs).times(asked.scale)


def assumed(bench: Bench, config: Any) -> Iterator[str]:
    """What `work` takes for granted."""
    own, family = bench.settings, _family(bench, config)
    yield f"{len(family.claims)} claims; {own.decided:.0%} of the prompts have a decision ({family.decision})"
    if family.decision != "soft":
        yield f"it stands at {own.decided_at:.0%} of the trace; {own.tries:g} continuations are tried for each"
    if config.pairs:
        yield f"{len(config.pairs)} pairs like the first, one after another"


def _family(bench: Bench, config: Any) -> Family:
    loaded = bench.questions.loaded
    return read_claims(config.claims) if loaded is None else loaded.family
