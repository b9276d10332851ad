"""One-sided tests of a mean over examples whose size holds for skewed scores, and their power.

The largest of three p values is taken: Student's t; Student's t on Hall's transform of the studentised mean, which
removes the first-order effect of skewness (Hall, "On the removal of skewness by transformation", JRSS B 1992); and the
chance of n examples without one of those that would bring the mean back to 0 (the rule of three: Hanley &
Lippman-Hand, JAMA 1983). Small samples show less skewness than there is, so it enters `SKEW` times; the factor comes
from simulation.

Share of true nulls on their bound that are rejected at 5 % (20,000 draws; scores skewed against the test, the worst of:
mirrored exponential, mirrored lognormal of sigma 1, recoveries where a fifth of the prompts carries all):

    n                   25      40      80      160
    Student's t alone   15.9 %  14.1 %  11.9 %  10.2 %
    this test            6.3 %   5.8 %   5.3 %   5.1 %

Where a tenth of the examples carries all, and the test is against its sign: 10 % at n = 25, 7 % at 30, 4.7 % at 36,
since one sample in fourteen of 25 holds none of them; hence `MIN_TESTED`. Nine shapes from there on: at most 6.2 %
(`tests/planted/test_calibration.py`). Normal and heavy-tailed symmetric scores: 4.4 to 5.0 %. Scores of two values
(right or wrong against a bound) also have to pass the exact binomial test, and those of three, a whole apart (changes
of right or wrong, against a bound), Tango's score test: without it, by enumeration, up to 7.4 % at n = 60 (a bound of
.05, one answer in 12 changed) and at 100, with it at most 5.4 % at 36 to 100. Where all scores are equal, nothing is
known of how they vary: what counts is the chance of n examples without one of those that lie as far against the claim
as any can (`far`), as with none of 500 answers changed. Sign flips suppose symmetry and fail as Student's t does. No
test holds for every distribution (Bahadur & Savage, Ann. Math. Stat. 1956).

The third p is for what simulation did not have: components of real pairs that do nothing but on one prompt in a
hundred, and there a lot. Samples without such a prompt look like proof that the effect is small. Every attn, MLP and
head of the embedded pair at all tokens and at the decision, both directions, claims on their bound at n = 60 (2,000
draws from a pool of measured prompts; `first`: 449 prompts, 216 cells; `soft`: 480, 108; two sides each):

                               first          soft
    without it   above 6.5 %   9.7 %          11.6 %     of the cells' sides
                 the worst     35.6 %         19.8 %
    with it      above 6.5 %   0.9 %          0.5 %
                 the worst     12.7 %         6.7 %

The 12.7 % are of one head that hinders a little on most prompts and helps a lot on a few.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from interp.hypotheses.claim import Correction
from interp.statistics import levels, over_looks
from interp.statistics.looks import NEAREST

MIN_TESTED = 36
"""Fewer examples give no verdict."""
SKEW = 1.5


def one_sided(
    scores: Float[np.ndarray, "*cells example"],
    unseen: Float[np.ndarray, "*#cells"] | float = 0.0,
    far: tuple[Float[np.ndarray, "*#cells"] | float, Float[np.ndarray, "*#cells"] | float] | None = None,
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """p of mean <= 0 (small: the mean lies above 0), and p of mean >= 0 (small: below).

    Args:
        scores: NaN means no value.
        unseen: the score of examples that there may be although none was drawn; 0: there are none to reckon with. A
            share q of them brings a mean m back to 0 where (1 - q) m + q unseen = 0, and n examples hold none of them
            with chance (1 - q)^n, a p for the side that they are not on.
        far: how far below 0, and above, a score can lie at most (positive numbers); what decides where all scores are
            equal. None: not known, and nothing does.

    Where all scores are -1, 0 or 1 (paired right or wrong against a bound of 0), the exact binomial p of McNemar's test
    counts as well, and the largest is taken.

    Returns:
        Two p per cell; NaN where fewer than `MIN_TESTED` have a value, one is infinite, or all are equal and `far` is
        not known.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim == 1:
        above, below = one_sided(scores[None], unseen, far)
        return np.asarray(above[0]), np.asarray(below[0])
    infinite = np.asarray(np.isinf(scores).any(-1))
    scores = np.where(infinite[..., None], np.nan, scores)
    there = ~np.isnan(scores)
    n = there.sum(-1)
    size = np.maximum(n, 2)
    mean = np.where(there, scores, 0).sum(-1) / size
    centred = np.where(there, scores - mean[..., None], 0)
    variance = (centred**2).sum(-1) / size
    largest = np.abs(np.where(there, scores, 0)).max(-1, initial=0)
    usable = (n >= MIN_TESTED) & (variance > (1e-9 * largest) ** 2)
    sd = np.sqrt(np.where(usable, variance, 1))
    unbiased = np.sqrt(size * (size - 1)) / np.maximum(size - 2, 1)
    skew = SKEW * unbiased * (centred**3).sum(-1) / size / sd**3
    student = mean / sd * np.sqrt(size - 1)
    small = student / np.sqrt(size)
    hall = np.sqrt(size) * (small + skew * small**2 / 3 + skew**2 * small**3 / 27 + skew / (6 * size))
    above = np.maximum(stats.t.sf(student, size - 1), stats.t.sf(hall, size - 1))
    below = np.maximum(stats.t.cdf(student, size - 1), stats.t.cdf(hall, size - 1))
    coin = (np.isin(scores, (-1.0, 0.0, 1.0)) | ~there).all(-1)
    gained, lost = ((scores == value).sum(-1) for value in (1, -1))
    above = np.where(coin, np.maximum(above, stats.binom.sf(gained - 1, gained + lost, 0.5)), above)
    below = np.where(coin, np.maximum(below, stats.binom.sf(lost - 1, gained + lost, 0.5)), below)
    for special in (_two_valued(scores, there, n), _three_valued(scores, there, n)):
        above, below = np.fmax(above, special[0]), np.fmax(below, special[1])
    back = np.where(np.equal(unseen, 0), np.inf, np.abs(unseen))
    none = (1 - np.abs(mean) / (np.abs(mean) + back)) ** n
    above = np.where((unseen < 0) & (mean > 0), np.maximum(above, none), above)
    below = np.where((unseen > 0) & (mean < 0), np.maximum(below, none), below)
    above, below = np.where(usable, above, np.nan), np.where(usable, below, np.nan)
    if far is None:
        return above, below
    same = ~usable & (n >= MIN_TESTED)
    against, for_ = (np.asarray(side, dtype=float) for side in far)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = [(1 - np.abs(mean) / (np.abs(mean) + side)) ** n for side in (against, for_)]
    above = np.where(same, np.where(mean > 0, kept[0], 1.0), above)
    below = np.where(same, np.where(mean < 0, kept[1], 1.0), below)
    return above, below


def _two_valued(
    scores: Float[np.ndarray, "*cells example"],
    there: Bool[np.ndarray, "*cells example"],
    n: Int[np.ndarray, "*cells"],
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """The exact binomial p of each side where scores take two values, one below 0 and one above; NaN elsewhere."""
    low = np.where(there, scores, np.inf).min(-1, initial=np.inf)
    high = np.where(there, scores, -np.inf).max(-1, initial=-np.inf)
    two = ((scores == low[..., None]) | (scores == high[..., None]) | ~there).all(-1) & (low < 0) & (high > 0)
    low, high = np.where(two, low, -1.0), np.where(two, high, 1.0)
    hits = (scores == high[..., None]).sum(-1)
    share = -low / (high - low)
    above, below = stats.binom.sf(hits - 1, n, share), stats.binom.cdf(hits, n, share)
    return np.where(two, above, np.nan), np.where(two, below, np.nan)


def _three_valued(
    scores: Float[np.ndarray, "*cells example"],
    there: Bool[np.ndarray, "*cells example"],
    n: Int[np.ndarray, "*cells"],
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """p of each side where scores are -1, 0 or 1 less a bound: paired right or wrong; NaN elsewhere.

    The variance is the one that a mean on the bound has at its most likely: Tango, "Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design", Statistics in Medicine 1998, equation 10.
    """
    low = np.where(there, scores, np.inf).min(-1, initial=np.inf)
    high = np.where(there, scores, -np.inf).max(-1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        apart = np.where(n > 0, high - low, np.nan)
        # of two values either may be the one of no change: that which a bound nearer to 0 gives
        of_two = np.where(np.abs(low) <= np.abs(high), low, high)
        none = np.where(np.abs(apart - 2) < 1e-9, (low + high) / 2, of_two)
        change = scores - none[..., None]
        whole = np.abs(change - np.round(change)) < 1e-9
        paired = (np.isin(np.round(change), (-1, 0, 1)) & whole | ~there).all(-1) & (np.abs(none) < 1)
        bound = np.where(paired & (n > 0), -none, 0.0)
        gained, lost = ((np.round(change) == side).sum(-1) for side in (1, -1))
        size = np.maximum(n, 1)
        linear = -gained - lost + (2 * size - gained + lost) * bound
        root = np.sqrt(np.maximum(linear**2 + 8 * size * lost * bound * (1 - bound), 0))
        variance = size * ((root - linear) / (2 * size) + bound * (1 - bound))
        z = (gained - lost - size * bound) / np.sqrt(np.where(paired & (variance > 1e-9), variance, np.nan))
    return stats.norm.sf(z), stats.norm.cdf(z)


def adjusted(
    p: Float[np.ndarray, "*rows claim"], correction: Correction | str
) -> Float[np.ndarray, "*rows claim"]:
    """p values corrected for the family in each row; a claim without a p counts as one, and stays NaN.

    The same as `interp.statistics.adjust` of each row.
    """
    if correction == "none":
        return p
    filled = np.where(np.isnan(p), 1.0, p)
    m = p.shape[-1]
    order = np.argsort(filled, -1)
    ranked = np.take_along_axis(filled, order, -1)
    if correction == "holm":
        stepped = np.maximum.accumulate(ranked * (m - np.arange(m)), -1)
    else:
        up = ranked * m / (1 + np.arange(m))
        stepped = np.minimum.accumulate(up[..., ::-1], -1)[..., ::-1]
    out = np.empty_like(filled)
    np.put_along_axis(out, order, np.minimum(stepped, 1.0), -1)
    return np.where(np.isnan(p), np.nan, out)


def power(
    scores: Float[np.ndarray, "claim example"],
    shifts: Float[np.ndarray, " claim"],
    alpha: float,
    correction: Correction | str,
    unseen: Float[np.ndarray, " claim"],
    *,
    far: Float[np.ndarray, "2 claim"] | None = None,
    shares: Sequence[Sequence[float]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Float[np.ndarray, " claim"]:
    """The chance that each claim is supported at this n if its scores had the mean `shifts`, the others as observed.

    Examples are drawn again with replacement, the whole family at once, and put through the same test and correction.

    Args:
        scores: as for `one_sided`, of the same examples for every claim.
        shifts: the mean of each claim's scores under its alternative; NaN: no alternative.
        alpha, correction: of the family.
        unseen, far: of each claim, as for `one_sided`; a draw may hold equal scores only.
        shares: of each claim, of the planned examples at this look and those before (`interp.statistics.levels`);
            empty, or None: a single look.
        resamples: draws; the result's own standard error is at most 0.016 at 1000.
        seed: of the draws.

    Returns:
        NaN where there is no alternative, or no p for the scores as they are.
    """
    n = scores.shape[-1]
    rows = np.random.default_rng(seed).integers(n, size=(resamples, n))
    observed = np.full((resamples, len(scores)), np.nan)
    moved = np.full((resamples, len(scores)), np.nan)
    testable = ~np.isnan(one_sided(scores)[0])

    def p(drawn: Float[np.ndarray, "draw example"], k: int) -> Float[np.ndarray, " draw"]:
        found = one_sided(drawn, unseen[k], None if far is None else (far[0, k], far[1, k]))[0]
        return over_looks(found, shares[k]) if shares is not None and len(shares[k]) else found

    for k in np.flatnonzero(testable).tolist():
        drawn = scores[k][rows]
        observed[:, k] = p(drawn, k)
        if not np.isnan(shifts[k]):
            moved[:, k] = p(drawn - np.nanmean(scores[k]) + shifts[k], k)
    found = np.full(len(scores), np.nan)
    for k in np.flatnonzero(testable & ~np.isnan(shifts)):
        family = observed.copy()
        family[:, k] = moved[:, k]
        found[k] = (adjusted(family, correction)[:, k] <= alpha).mean()
    return found


def examples_needed(
    shift: float, sd: float, level: float, chance: float = 0.8, unseen: float = 0.0
) -> int | None:
    """Examples with a value at which a mean of `shift` is found above 0; None where it never is.

    Args:
        shift, sd: mean and standard deviation of the scores.
        level: of the test.
        chance: the power wanted.
        unseen: as for `one_sided`.
    """
    from statsmodels.stats.power import TTestPower

    if not shift > 0 or not sd > 0:
        return None
    n = MIN_TESTED
    if shift / sd <= 5:
        power = {"alpha": level, "power": chance, "alternative": "larger"}
        n = max(n, math.ceil(float(np.ravel(TTestPower().solve_power(shift / sd, nobs=None, **power))[0])))
    if unseen >= 0 or _clear_of_unseen(sd, n, level, chance, unseen) <= shift:
        return n
    high = n
    while _clear_of_unseen(sd, high, level, chance, unseen) > shift:
        n, high = high, 2 * high
    return bisect.bisect_left(
        range(high), -shift, lo=n, key=lambda size: -_clear_of_unseen(sd, size, level, chance, unseen)
    )


def examples_needed_at_a_later_look(
    shift: float,
    sd: float,
    level: float,
    n: int,
    shares: Sequence[float],
    chance: float = 0.8,
    unseen: float = 0.0,
) -> int | None:
    """`examples_needed` where alpha is spent over looks: at this one, of `n` examples, or else at one further look.

    Beyond what was planned, the number that the last look would take.

    Args:
        shift, sd, level, chance, unseen: as for `examples_needed`; level is that of all looks together.
        n: examples with a value at this look.
        shares: of the planned examples, at this look and those before.
    """

    def needed(*looks: float) -> int | None:
        return examples_needed(shift, sd, float(levels(looks, level)[-1]), chance, unseen)

    now = needed(*shares)
    if now is None or now <= n or shares[-1] + NEAREST > 1:
        return now
    most = math.floor(n / shares[-1])

    def enough(size: int) -> bool:
        share = min(max(size / most, shares[-1] + NEAREST), 1.0)
        more = needed(*shares, share)
        return more is not None and more <= size

    if not enough(most):
        return needed(*shares, 1.0)
    return bisect.bisect_left(range(most), True, lo=n + 1, key=enough)


def detectable(sd: float, n: int, level: float, chance: float = 0.8, unseen: float = 0.0) -> float:
    """The mean of the scores that is found above 0 with this chance at this n; arguments of `examples_needed`."""
    from statsmodels.stats.power import TTestPower

    if n < 2 or not sd > 0:
        return math.nan
    effect = TTestPower().solve_power(None, nobs=n, alpha=level, power=chance, alternative="larger")
    return max(float(np.ravel(effect)[0]) * sd, _clear_of_unseen(sd, n, level, chance, unseen))


def _clear_of_unseen(sd: float, n: int, level: float, chance: float, unseen: float) -> float:
    """The mean whose samples have, with this chance, a mean that unseen examples do not explain (normal means)."""
    if unseen >= 0:
        return 0.0
    return -unseen * (level ** (-1 / n) - 1) + float(stats.norm.ppf(chance)) * sd / math.sqrt(n)
