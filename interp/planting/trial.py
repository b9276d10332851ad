"""One plant tried by every method, and what is kept of it: a row per method and component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooks import HookedVLM
from interp.decision import DecisionSet, find_decisions, null_pair_denominator, recovery_refused
from interp.examples import Example
from interp.pair import Pair
from interp.patching import Component
from interp.planting.methods import Method, Subject
from interp.planting.plants import Plant, planted, truth
from interp.roles import TraceFormat
from interp.statistics import adjust, sign_flips

ALPHA = 0.05


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
) -> pd.DataFrame:
    """Every method on the pair of IN and a planted copy of it.

    Args:
        in_, donor, plant: see `interp.planting.planted`; neither model changes.
        examples: the prompts of this pair.
        methods: by name.
        among: what the methods choose among.
        max_new_tokens, batch_size, trace_format: as everywhere.

    Returns:
        One row per method and component: score, |mean effect| over examples (a relative norm for `compare`; NaN where
        the method cannot say); effect; p, of a sign flip test over examples, and p_corrected (Holm, over the
        components of this pair and method); changed (the truth); n; refused: why no recovery of this pair is given, by
        the rule of `interp.decision.recovery_refused`; denominator, nats.
    """
    model = planted(in_, donor, plant)
    pair = Pair(in_, model, trace_format=trace_format)
    decisions = find_decisions(
        pair, examples, "soft", max_new_tokens=max_new_tokens, batch_size=batch_size, progress=False
    )
    refused, size = "no prompt qualifies", 0.0
    if len(decisions):
        refused = recovery_refused(decisions, null_pair_denominator(pair, decisions, plant.seed, batch_size))
        size = float(np.mean(decisions.rl_values - decisions.in_values))
    changed = truth(among, plant).numpy()
    subject, tables = Subject(pair, decisions, among, batch_size), []
    for name, method in methods.items():
        effects = method.run(subject) if len(decisions) else np.full((len(among), 0), np.nan)
        table = _scored(effects, method.tests)
        table.insert(0, "method", name)
        table.insert(1, "component", [component.name for component in among])
        tables.append(table.assign(changed=changed, refused=refused if method.moves else ""))
    model.close()
    return pd.concat(tables, ignore_index=True).assign(n=len(decisions), denominator=size)


def effect_of_plant(
    in_: HookedVLM,
    donor: HookedVLM,
    plant: Plant,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    trace_format: TraceFormat | None = None,
) -> float:
    """How far a plant moves IN's output, whatever any method says of it.

    Returns:
        Nats: the mean over examples of sum_t KL(p || q) + KL(q || p) between the planted copy and IN along the copy's
        own greedy text (the soft metric's denominator).
    """
    model = planted(in_, donor, plant)
    pair = Pair(in_, model, trace_format=trace_format)
    found = find_decisions(
        pair, examples, "soft", max_new_tokens=max_new_tokens, batch_size=batch_size, progress=False
    )
    model.close()
    return _size(found)


def _size(found: DecisionSet) -> float:
    return float(np.mean(found.rl_values - found.in_values)) if len(found) else 0.0


def _scored(effects: Float[np.ndarray, "component example"], tests: bool) -> pd.DataFrame:
    means = effects.mean(axis=1) if effects.shape[1] else np.full(len(effects), np.nan)
    p = np.full(len(effects), np.nan)
    if tests and effects.shape[1]:
        p = sign_flips(effects)
    return pd.DataFrame({"score": np.abs(means), "effect": means, "p": p, "p_corrected": adjust(p, "holm")})
