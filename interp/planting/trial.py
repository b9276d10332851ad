"""One plant tried by every method, and what is kept of it: a row per method and component."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from hooks import FrankenlensError, HookedVLM
from interp.decision import DecisionSet, find_decisions, null_pair_denominator, recovery_refused
from interp.decision.soft import Change, both
from interp.map.components import Component
from interp.pair import greedy
from interp.pair.pair import Pair
from interp.planting.methods import Method, Subject
from interp.planting.plants import Plant, Planted, planted_and_measured, told_apart, truth
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.statistics import MIN_EXAMPLES, adjust, sign_flips

ALPHA = 0.05
TEST = "a sign flip test over prompts, which tests symmetry about 0, not the mean: that takes 36 prompts"
"""A dozen prompts have no test of the mean (`interp.statistics.mean_test`), which is used everywhere else."""


def trial(
    in_: HookedVLM,
    donor: HookedVLM,
    plant: Plant,
    examples: Sequence[Example],
    methods: Mapping[str, Method],
    among: Sequence[Component],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    trace_format: TraceFormat | None = None,
    template: str | None = None,
    system: str | None = None,
    instruction: str = "",
) -> pd.DataFrame:
    """Every method on the pair of IN and a planted copy of it.

    Args:
        in_, donor, plant: see `interp.planting.planted`; neither model changes.
        examples: the prompts of this pair.
        methods: by name.
        among: what the methods choose among; what a plant changed a part of is neither changed nor left alone, and is
            left out.
        max_new_tokens, batch_size, trace_format, template, system, instruction: as everywhere.

    Returns:
        One row per method and component: score, |mean effect| over the examples that have one (a relative norm for
        `compare`; NaN where the method cannot say); effect; p, of sign flips over examples (`TEST`), and p_corrected
        (Holm, over the components of this pair and method), NaN where so few examples could prove nothing
        (`claims_possible`); changed (the truth); n; refused: why no recovery of this pair is given, by the rule of
        `interp.decision.recovery_refused`; denominator, nats; norm_ratio and cosine of the plant that the weights hold
        to the one asked for, noise_ratio of the noise.

    Raises:
        FrankenlensError: as `planted`; the plant lies outside the components; no prompt can be scored.
    """
    known = told_apart(among, plant)
    changed = truth(known, plant).numpy()
    if plant.components and not changed.any():
        raise FrankenlensError(
            f"none of the {len(among)} components to choose among lies in {', '.join(plant.components)}; plant whole "
            "heads, MLPs, layers, with `EVERYWHERE` vision blocks and the projector, or with `WITH_EXPERTS` experts"
        )
    among = known
    with planted_pair(in_, donor, plant, trace_format, template, system, instruction) as (pair, made):
        settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": False}
        decisions = find_decisions(pair, examples, "soft", **settings)
        if not len(decisions):
            why = "; ".join(f"{n}: {reason}" for reason, n in decisions.excluded.items())
            raise FrankenlensError(f"no prompt can be scored on this pair ({why}); give others")
        refused = recovery_refused(decisions, null_pair_denominator(pair, decisions, plant.seed, batch_size))
        subject, tables = Subject(pair, decisions, among, batch_size), []
        for name, method in methods.items():
            table = _scored(method.run(subject), method.tests)
            table.insert(0, "method", name)
            table.insert(1, "component", [component.name for component in among])
            tables.append(table.assign(changed=changed, refused=refused if method.moves else ""))
    held = {"norm_ratio": made.held.norm_ratio, "cosine": made.held.cosine}
    held["noise_ratio"] = made.noise.norm_ratio
    return pd.concat(tables, ignore_index=True).assign(n=len(decisions), denominator=_size(decisions), **held)


def effect_of_plant(
    in_: HookedVLM,
    donor: HookedVLM,
    plant: Plant,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    trace_format: TraceFormat | None = None,
    template: str | None = None,
    system: str | None = None,
    instruction: str = "",
) -> float:
    """How far a plant moves what IN answers, measured by no method: total variation along IN's own text.

    Neither the metric nor the text of patching (which reads log odds, weighted by the difference of the two models, on
    the copy's text): of a change of effect e, IN and the copy can be sampled together so that they write the same
    tokens but for e of them on average.

    Returns:
        Tokens: the mean over examples of sum_t |p - q| / 2 over the vocabulary, between the planted copy and IN, along
        IN's greedy text.
    """
    with (
        planted_pair(in_, donor, plant, trace_format, template, system, instruction) as (pair, _),
        torch.no_grad(),
    ):
        prompts = [pair.builder.build(example) for example in examples]
        written = greedy(in_, prompts, max_new_tokens, batch_size)
        traces = [prompt.with_tokens(ids) for prompt, ids in zip(prompts, written, strict=True)]
        changes = (Change(own, theirs) for own, theirs in both(in_, pair.rl, traces, batch_size))
        apart = [
            sum(float(change[some].abs().sum()) for some in change.after.chunks()) / 2 for change in changes
        ]
    effect = float(np.mean(apart)) if apart else float("nan")
    if not np.isfinite(effect):
        raise FrankenlensError(
            f"the effect of {plant} is {effect}: no prompt can be scored, or the model overflows"
        )
    return effect


@contextmanager
def planted_pair(
    in_: HookedVLM,
    donor: HookedVLM,
    plant: Plant,
    trace_format: TraceFormat | None,
    template: str | None,
    system: str | None,
    instruction: str,
) -> Iterator[tuple[Pair, Planted]]:
    """IN and its planted copy as a pair, closed afterwards, and what the copy's weights hold of the plant."""
    made = planted_and_measured(in_, donor, plant)
    try:
        yield Pair(in_, made.vlm, None, trace_format, template, system, instruction=instruction), made
    finally:
        made.vlm.close()


def _size(found: DecisionSet) -> float:
    return float(np.mean(found.rl_values - found.in_values)) if len(found) else float("nan")


def _scored(effects: Float[np.ndarray, "component example"], tests: bool) -> pd.DataFrame:
    known = ~np.isnan(effects)
    n = known.sum(axis=1)
    means = np.where(n > 0, np.where(known, effects, 0.0).sum(axis=1) / np.maximum(n, 1), np.nan)
    p = np.full(len(effects), np.nan)
    resamples = max(9999, math.ceil(4 * len(effects) / ALPHA))
    if tests and claims_possible(len(effects), effects.shape[1]):
        p = sign_flips(effects, resamples=resamples)
    return pd.DataFrame({"score": np.abs(means), "effect": means, "p": p, "p_corrected": adjust(p, "holm")})


def claims_possible(n_components: int, n_examples: int) -> bool:
    """Whether the smallest p of sign flips, 2 / 2^n, corrected for so many components, can lie below 0.05.

    And whether there are examples enough for the refusal of recoveries, which takes an interval.
    """
    return n_examples >= MIN_EXAMPLES and n_components * 2.0 ** (1 - n_examples) < ALPHA
