"""The verdict on each claim of a family: supported, refuted or undecided at this n, with interval, control and power.

A claim is a statement on one mean over examples, E[d] > 0. Of a recovery >= r,

    d = (patched - recipient) - r (donor - recipient),

which is linear: since sum(donor - recipient) > 0 (checked first; for IN into RL both change sign), mean(d) > 0 if and
only if sum(patched - recipient) / sum(donor - recipient) > r. So the paired test of d is a test of the ratio of sums
itself. Of an effect or a change in accuracy >= b, d is the example's own minus b; claims that compare two components
take the difference of the two; "<=" changes the sign of d.

No sample shows what a prompt does that is not in it. A verdict that something is small therefore also has to hold if
prompts as yet unseen were moved all the way (recovery 1 or -1, the whole decision, right instead of wrong), in such a
number that n prompts without one of them are no surprise: `unseen`, and the third p of `one_sided`.

Supported: mean(d) <= 0 is rejected at alpha after correction over the family. Refuted: mean(d) >= 0 is, corrected in
the same way. Each of the two has level alpha. Neither: undecided at this n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from interp.hypotheses.claim import Claim, Family
from interp.hypotheses.measure import Measured
from interp.hypotheses.one_sided import (
    MIN_TESTED,
    adjusted,
    detectable,
    examples_needed,
    one_sided,
    power,
)
from interp.hypotheses.verdict import Verdict, shown
from interp.statistics import Interval, bootstrap_mean, bootstrap_ratio


def scores(claim: Claim, measured: Measured) -> Float[np.ndarray, "*cells example"]:
    """d of every example: the claim is that their mean lies above 0."""
    if claim.quantity != "recovery":
        return claim.sign * (measured.effect - claim.bound)
    orientation = 1 if claim.direction == "rl_to_in" else -1
    return claim.sign * orientation * (measured.effect - claim.bound * measured.total)


def unseen(claim: Claim, measured: Measured) -> Float[np.ndarray, "*cells"]:
    """d of an example moved all the way to the bound's side of 0; 0 for a bound of 0, which has none, or beyond it."""
    whole = np.abs(_whole(measured)) if claim.quantity == "effect" else 1.0
    left = np.maximum(whole - abs(claim.bound), 0)
    return np.asarray(claim.sign * np.sign(claim.bound) * left * _scale(claim, measured))


def judge(
    family: Family,
    claims: Mapping[str, Claim],
    measured: Mapping[str, Measured],
    origins: Mapping[str, str],
    refused: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> list[Verdict]:
    """The verdicts on a family, in its order.

    Args:
        family: as registered; claims that were not measured count in the correction.
        claims: by name, as resolved on the model.
        measured: by name, on the same examples.
        origins: what `interp.hypotheses.held_out.origins` returns.
        refused: by name, why a claim cannot be tested on this pair.
        seed, resamples: of intervals and power.
    """
    refused = {**(refused or {})}
    for claim in claims.values():
        if claim.name in measured and claim.name not in refused:
            reason = _no_denominator(claim, measured[claim.name], seed)
            refused |= {claim.name: reason} if reason else {}
    tested = [c for c in claims.values() if c.name in measured and c.name not in refused]
    n_examples = max((len(m.effect) for m in measured.values()), default=0)
    d = np.full((len(family.claims), n_examples), np.nan)
    beyond = np.full_like(d, np.nan)
    shifts = np.full(len(family.claims), np.nan)
    away = np.zeros(len(family.claims))
    order = {claim.name: k for k, claim in enumerate(family.claims)}
    for claim in tested:
        own, k = measured[claim.name], order[claim.name]
        d[k], away[k] = scores(claim, own), unseen(claim, own)
        if claim.of_an_effect:
            beyond[k] = scores(claim, own) - scores(claim, _control(own))
        shifts[k] = _scale(claim, own) * _distance(claim, claim.alternative)
    above, below = one_sided(d, away)
    p, against, control = (adjusted(x, family.correction) for x in (above, below, one_sided(beyond)[0]))
    chances = (
        power(d, shifts, family.alpha, family.correction, away, resamples=resamples, seed=seed)
        if n_examples
        else shifts
    )
    verdicts = []
    for k, registered in enumerate(family.claims):
        claim, origin = claims[registered.name], origins.get(registered.name, "not stated")
        if claim not in tested:
            none = _interval_of_nothing()
            why = refused.get(claim.name, "it was not measured")
            verdicts.append(Verdict(claim, "refused", none, none, origin=origin, reason=why))
            continue
        own = measured[claim.name]
        verdicts.append(
            Verdict(
                claim,
                _verdict(p[k], against[k], family.alpha),
                _quantity(claim, own.effect, own.total, seed),
                _quantity(claim, own.control, own.total, seed),
                p=float(p[k]),
                p_against=float(against[k]),
                p_control=float(control[k]),
                power=float(chances[k]),
                **_design(claim, own, d[k], float(shifts[k]), family.level, float(away[k])),
                origin=origin,
                reason=_untestable(d[k]),
            )
        )
    return verdicts


def _verdict(p: float, against: float, alpha: float) -> str:
    return "supported" if p <= alpha else "refuted" if against <= alpha else "undecided"


def _control(own: Measured) -> Measured:
    return Measured(own.control, own.control, own.total, own.units)


def _quantity(claim: Claim, effect: np.ndarray, total: np.ndarray, seed: int) -> Interval:
    settings = {"confidence": claim.confidence, "seed": seed}
    if claim.quantity == "recovery":
        return bootstrap_ratio(effect, total, **settings)
    return bootstrap_mean(effect, **settings)


def _scale(claim: Claim, own: Measured) -> Float[np.ndarray, "*cells"]:
    """How far the mean of d moves when the quantity moves by 1."""
    if claim.quantity != "recovery":
        return np.ones(own.effect.shape[:-1])
    return np.asarray(_whole(own) * (1 if claim.direction == "rl_to_in" else -1))


def _whole(own: Measured) -> Float[np.ndarray, "*cells"]:
    """Mean of donor - recipient over the examples that have a value; NaN where none has."""
    there = ~np.isnan(own.effect)
    n = there.sum(-1)
    return np.asarray(np.where(there, own.total, 0).sum(-1) / np.where(n > 0, n, np.nan))


def _distance(claim: Claim, value: float | None) -> float:
    return math.nan if value is None else claim.sign * (value - claim.bound)


def _design(
    claim: Claim, own: Measured, d: np.ndarray, shift: float, level: float, away: float
) -> dict[str, Any]:
    n = int((~np.isnan(d)).sum())
    sd = float(np.nanstd(d, ddof=1)) if n > 1 else math.nan
    tested = not np.isnan(one_sided(d)[0])
    needed = examples_needed(shift, sd, level, unseen=away) if tested and not math.isnan(shift) else None
    least = detectable(sd, n, level, unseen=away) / float(_scale(claim, own)) if tested else math.nan
    return {"n": n, "n_needed": needed, "detectable": claim.bound + claim.sign * least}


def _untestable(d: np.ndarray) -> str:
    n = int((~np.isnan(d)).sum())
    if n < MIN_TESTED:
        return f"{n} examples have a value; a verdict takes {MIN_TESTED}: give more (--n)"
    return "every example has the same value" if np.isnan(one_sided(d)[0]) else ""


def _no_denominator(claim: Claim, own: Measured, seed: int) -> str:
    """Why the examples of a recovery leave nothing to be a share of; "" where they do."""
    there = ~np.isnan(own.effect)
    if claim.quantity != "recovery" or there.sum() < MIN_TESTED:
        return ""
    orientation = 1 if claim.direction == "rl_to_in" else -1
    whole = bootstrap_mean(orientation * own.total[there], seed=seed)
    if not float(whole.low) > 0:
        return (
            f"the difference between RL and IN that it is a share of, {shown(whole)} {own.units}, includes 0"
        )
    return ""


def _interval_of_nothing() -> Interval:
    nan = np.array(np.nan)
    return Interval(nan, nan, nan, np.array(0))
