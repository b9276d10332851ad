"""The verdict on each claim of a family: supported, refuted or undecided at this n, with interval, control and power.

A claim is a statement on one mean over examples, E[d] > 0. Of a recovery >= r,

    d = (patched - recipient) - r (donor - recipient),

which is linear: since sum(donor - recipient) > 0 (checked first; for IN into RL both change sign), mean(d) > 0 if and
only if sum(patched - recipient) / sum(donor - recipient) > r. So the paired test of d is a test of the ratio of sums
itself. Of an effect or a change in accuracy >= b, d is the example's own minus b; claims that compare two components
take the difference of the two; "<=" changes the sign of d.

Examples of one cluster (by default, of one image) are not independent: their d are summed, and what is tested is the
mean of the sums over clusters. Where all d are equal, how they vary is not known, and the exact chance decides of n
units without one that lies as far against the claim as any can (0 of 500 answers changed: at most 5 % are, p =
0.95^500).

No sample shows what a prompt does that is not in it. A verdict that something is small therefore also has to hold if
prompts as yet unseen were moved all the way (recovery 1 or -1, the whole decision, right instead of wrong), in such a
number that n prompts without one of them are no surprise: `unseen`, and the third p of `one_sided`.

Supported: mean(d) <= 0 is rejected at alpha after correction over the family, and a claim of an effect has one that is
larger, in magnitude, than its control's: what something meaningless of the same size does as well is no support.
Refuted: mean(d) >= 0 is, corrected in the same way. Each of the two has level alpha. Neither: undecided at this n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from interp.hypotheses.claim import Claim, Family
from interp.hypotheses.ledger import Looks
from interp.hypotheses.measure import Measured
from interp.hypotheses.one_sided import (
    MIN_TESTED,
    adjusted,
    detectable,
    examples_needed,
    examples_needed_at_a_later_look,
    one_sided,
    power,
)
from interp.hypotheses.verdict import Verdict, shown
from interp.map.summary import turned_up
from interp.statistics import (
    MIN_EXAMPLES,
    Interval,
    change_interval,
    levels,
    mean_interval,
    over_looks,
    ratio_interval,
)
from interp.statistics.moments import summed

NO_CONTROL = "its control has no value to compare it with, and without one nothing is supported"
AS_MUCH = "its control, as large and of random direction, moves as much or more"


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
    clusters: Sequence[str] | None = None,
    looks: Mapping[str, Looks] | None = None,
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
        clusters: of the examples, in their order (`interp.questions.examples.cluster_of`); None: each stands alone.
        looks: by name, what `Ledger.looks` returns; None: this is the first.
        seed, resamples: of power.
    """
    refused = {**(refused or {})}
    for claim in claims.values():
        if claim.name in measured and claim.name not in refused:
            reason = _no_denominator(claim, measured[claim.name], clusters)
            refused |= {claim.name: reason} if reason else {}
    tested = [c for c in claims.values() if c.name in measured and c.name not in refused]
    n_examples = max((len(m.effect) for m in measured.values()), default=0)
    n_units = n_examples if clusters is None else len(set(clusters))
    d = np.full((len(family.claims), n_units), np.nan)
    beyond = np.full_like(d, np.nan)
    shifts = np.full(len(family.claims), np.nan)
    away, sizes = np.zeros(len(family.claims)), np.ones(len(family.claims))
    far = np.full((2, len(family.claims)), np.nan)
    order = {claim.name: k for k, claim in enumerate(family.claims)}
    for claim in tested:
        own, k = measured[claim.name], order[claim.name]
        d[k], sizes[k] = _units(scores(claim, own), clusters)
        away[k], far[:, k] = sizes[k] * unseen(claim, own), sizes[k] * np.array(_far(claim, own))
        if claim.of_an_effect:
            beyond[k], _ = _units(_over_control(own), clusters)
        shifts[k] = sizes[k] * _scale(claim, own) * _distance(claim, claim.alternative)
    above, below = one_sided(d, away, (far[0], far[1]))
    for name, look in (looks or {}).items():
        if look.shares:
            k = order[name]
            above[k], below[k] = over_looks(np.array([above[k], below[k]]), look.shares)
    p, against, control = (adjusted(x, family.correction) for x in (above, below, one_sided(beyond)[0]))
    chances = (
        power(
            d,
            shifts,
            family.alpha,
            family.correction,
            away,
            far=far,
            shares=[(looks or {}).get(claim.name, Looks()).shares for claim in family.claims],
            resamples=resamples,
            seed=seed,
        )
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
        own, look = measured[claim.name], (looks or {}).get(claim.name, Looks())
        said, why = _looked_at(_verdict(p[k], against[k], family.alpha), look)
        reason = why or _untestable(own.effect, d[k], p[k])
        if said == "supported" and claim.of_an_effect and not np.nansum(beyond[k]) >= 0:
            said, reason = "undecided", AS_MUCH
        if said == "supported" and claim.of_an_effect and np.isnan(beyond[k]).all():
            said, reason = "undecided", NO_CONTROL
        verdicts.append(
            Verdict(
                claim,
                said,
                _quantity(claim, own.effect, own.total, clusters),
                _quantity(claim, own.control, own.total, clusters),
                p=float(p[k]),
                p_against=float(against[k]),
                p_control=float(control[k]),
                power=float(chances[k]),
                **_design(
                    claim,
                    own,
                    d[k],
                    float(shifts[k]),
                    family.level,
                    float(away[k]),
                    float(sizes[k]),
                    look.shares,
                ),
                origin="exploratory" if why else origin,
                reason=reason,
                look=look.number,
            )
        )
    return verdicts


def _verdict(p: float, against: float, alpha: float) -> str:
    return "supported" if p <= alpha else "refuted" if against <= alpha else "undecided"


def _over_control(own: Measured) -> Float[np.ndarray, "*cells example"]:
    """How much more the component moves than its control, whatever the signs of the two; its mean is |.| - |.|."""
    there = np.where(np.isnan(own.control), np.nan, own.effect)
    return turned_up(there) - turned_up(np.where(np.isnan(there), np.nan, own.control))


def _looked_at(verdict: str, look: Looks) -> tuple[str, str]:
    """The verdict at a look, and why it is not what the numbers say."""
    if look.number == 1 or look.shares or verdict in look.implied or verdict == look.first == "undecided":
        return verdict, ""
    return "undecided", (
        f"this is look {look.number}, and the first on record, at the nearest bound, was {look.first}, which does not "
        f"imply {verdict} at this bound and level: asked until it is true, a claim comes out true. Exploratory; to "
        "look again as prompts grow, register the claim with n_max before the first look"
    )


def _units(
    d: Float[np.ndarray, " example"], clusters: Sequence[str] | None
) -> tuple[Float[np.ndarray, " unit"], float]:
    """Sums over clusters, NaN for those without a value, and the mean number of examples in one."""
    if clusters is None or len(set(clusters)) == len(clusters):
        return d, 1.0
    finite = np.where(np.isinf(d), 0.0, d)
    sums, counts, there = summed(finite, np.ones(d.shape), np.asarray(clusters))
    if np.isinf(d).any():
        sums[np.flatnonzero(there)[:1]] = np.inf  # the test refuses the whole
    return np.where(there, sums, np.nan), float(counts[there].mean()) if there.any() else 1.0


def _far(claim: Claim, own: Measured) -> tuple[float, float]:
    """How far below and above 0 a score of this claim can lie; an effect of the whole either way is taken for most."""
    times = 2.0 if claim.more_than else 1.0
    whole = times * float(np.abs(_whole(own))) if claim.quantity == "effect" else times
    scale = abs(float(_scale(claim, own)))
    return max(whole + claim.sign * claim.bound, 0.0) * scale, max(
        whole - claim.sign * claim.bound, 0.0
    ) * scale


def _quantity(
    claim: Claim, effect: np.ndarray, total: np.ndarray, clusters: Sequence[str] | None
) -> Interval:
    settings = {
        "confidence": claim.confidence,
        "clusters": None if clusters is None else np.asarray(clusters),
    }
    if claim.quantity == "recovery":
        return ratio_interval(effect, total, **settings)
    if claim.quantity == "accuracy" and not claim.more_than:
        return change_interval(effect, np.zeros(len(effect)), **settings)
    return mean_interval(effect, **settings)


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
    claim: Claim,
    own: Measured,
    d: np.ndarray,
    shift: float,
    level: float,
    away: float,
    size: float,
    shares: Sequence[float],
) -> dict[str, Any]:
    """Numbers of examples, and what they can find; `size` examples make a unit, and `shares` are those of looks."""
    units = int((~np.isnan(d)).sum())
    tested = not np.isnan(one_sided(d)[0])
    pilot = units >= MIN_EXAMPLES and not np.isinf(d).any()
    sd = float(np.nanstd(d, ddof=1)) if tested or pilot else math.nan
    # A pilot that is too small for a test says how many a test takes, at least as many as any.
    planned = math.isfinite(sd) and not math.isnan(shift)
    needed, own_level = None, level
    if shares:
        own_level = float(levels(shares, level)[-1])
        if planned:
            needed = examples_needed_at_a_later_look(shift, sd, level, units, shares, unseen=away)
    elif planned:
        needed = examples_needed(shift, sd, level, unseen=away)
    least = (
        detectable(sd, units, own_level, unseen=away) / size / float(_scale(claim, own))
        if tested
        else math.nan
    )
    return {
        "n": int((~np.isnan(own.effect)).sum()),
        "units": units,
        "n_needed": None if needed is None else math.ceil(needed * size),
        "detectable": claim.bound + claim.sign * least,
    }


def _untestable(effect: np.ndarray, d: np.ndarray, p: float) -> str:
    n, units = int((~np.isnan(effect)).sum()), int((~np.isnan(d)).sum())
    if (infinite := int(np.isinf(effect).sum())) or np.isinf(d).any():
        return f"{infinite or 'some'} of {n} examples have an infinite value; a mean of them is none"
    if not n:
        return "no example has a value"
    if units < MIN_TESTED:
        of = "" if units == n else f" in {units} clusters, which alone are independent"
        return f"{n} examples have a value{of}; a verdict takes {MIN_TESTED}: give more (--n)"
    return "every example has the same value" if np.isnan(p) else ""


def _no_denominator(claim: Claim, own: Measured, clusters: Sequence[str] | None) -> str:
    """Why the examples of a recovery leave nothing to be a share of; "" where they do."""
    there = ~np.isnan(own.effect)
    if claim.quantity != "recovery" or there.sum() < MIN_TESTED:
        return ""
    orientation = 1 if claim.direction == "rl_to_in" else -1
    if not np.isfinite(own.total[there]).all():
        return "the difference between RL and IN is infinite on some example"
    total = orientation * own.total[there]
    if total.min() == total.max() > 0:
        return ""  # it does not vary, and has no interval
    of = None if clusters is None else np.asarray(clusters)[there]
    whole = mean_interval(total, clusters=of, fewest=MIN_EXAMPLES)
    if not float(whole.low) > 0:
        return (
            f"the difference between RL and IN that it is a share of, {shown(whole)} {own.units}, includes 0"
        )
    return ""


def _interval_of_nothing() -> Interval:
    nan = np.array(np.nan)
    return Interval(nan, nan, nan, np.array(0))
