"""Two models, or two variants of one, on the same examples: exact tests, corrections, and the examples they need.

NaN means that an example has no value; it is left out of both sides of the pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real
from scipy import stats

from hooks.errors import FrankenlensError
from interp.statistics.means import Clusters, mean_test


@dataclass(frozen=True)
class Discordance:
    """Examples on which two right-or-wrong outcomes differ, and McNemar's exact test of them.

    Attributes:
        n: examples that both have.
        gained, lost: right after and wrong before, and the other way round.
        p: two-sided; 1 where nothing differs, NaN where there is no example.
    """

    n: int
    gained: int
    lost: int
    p: float


def mcnemar(
    after: Real[np.ndarray, " example"],
    before: Real[np.ndarray, " example"],
    clusters: Clusters | None = None,
) -> Discordance:
    """McNemar's exact (binomial) test of paired right-or-wrong outcomes (1, 0, NaN).

    It takes examples to be independent. Where several make a cluster (questions about one image), p is that of
    `interp.statistics.mean_test` over clusters; NaN where they are too few for it.

    Raises:
        FrankenlensError: a value is none of 0, 1 and NaN.

    Example:
        >>> fl.mcnemar(np.array([1, 1, 1, 1, 0]), np.array([0, 0, 0, 1, 1]))
        Discordance(n=5, gained=3, lost=1, p=0.625)
    """
    a, b = _paired(after, before)
    if not np.isin(np.concatenate([a, b]), (0, 1)).all():
        raise FrankenlensError("mcnemar takes outcomes that are 0, 1 or NaN; for others use mean_test")
    gained, lost = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    if not len(a):
        return Discordance(0, 0, 0, math.nan)
    if clusters is not None and _hang_together(np.asarray(after) - np.asarray(before), clusters):
        change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
        return Discordance(len(a), gained, lost, float(mean_test(change, clusters=clusters)))
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Discordance(len(a), gained, lost, float(p))


def sign_flip(
    after: Real[np.ndarray, " example"],
    before: Real[np.ndarray, " example"],
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> float:
    """Two-sided p of mean(after - before) when the sign of each example's difference is a coin's.

    A test of symmetry about 0, not of the mean: skewed differences whose mean is 0 are rejected in 17 to 40 % at
    n = 8. Where a mean is claimed, use `mean_test`. Examples are taken to be independent. Exact where 2^n does not
    exceed `resamples`; NaN where no example has both values.

    Example:
        >>> fl.sign_flip(np.array([2.0, 1, 3, 2]), np.zeros(4))  # 2 of the 16 choices of signs are as far from 0
        0.125
    """
    a, b = _paired(after, before)
    differences = a - b
    if not len(differences):
        return math.nan
    if not differences.any():
        return 1.0
    if len(differences) == 1:
        return 1.0  # both signs are as far from 0
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=resamples, rng=seed, vectorized=True
    )
    return float(found.pvalue)


def sign_flips(
    differences: Real[np.ndarray, "row example"], *, resamples: int = 9999, seed: int = 0
) -> Float[np.ndarray, " row"]:
    """`sign_flip` of every row against 0; rows without a missing value are done together, flips in batches."""
    values = np.asarray(differences, dtype=np.float64)
    p = np.full(len(values), np.nan)
    whole = ~np.isnan(values).any(axis=1) & (values != 0).any(axis=1) & (values.shape[1] > 1)
    for row in np.flatnonzero(~whole):
        p[row] = sign_flip(values[row], np.zeros(values.shape[1]), resamples=resamples, seed=seed)
    if whole.any():
        p[whole] = stats.permutation_test(
            (values[whole],),
            np.mean,
            permutation_type="samples",
            n_resamples=resamples,
            rng=seed,
            vectorized=True,
            axis=1,
            batch=max(1, _ENTRIES // values[whole].size),
        ).pvalue
    return p


def _holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """As statsmodels' `multipletests`, which collects garbage at each call: half a second beside an open model."""
    order, out = np.argsort(p), np.empty_like(p)
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return out


def _benjamini_hochberg(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    from statsmodels.stats.multitest import fdrcorrection

    return fdrcorrection(p)[1]


_ENTRIES = 1 << 22
"""Numbers that are flipped at once."""
CORRECTIONS = {"holm": _holm, "bh": _benjamini_hochberg}


def adjust(p: Float[np.ndarray, "*tests"], method: str = "holm") -> Float[np.ndarray, "*tests"]:
    """p values corrected for being a family: "holm" (family-wise error), "bh" (false discovery rate); NaN stays NaN.

    Raises:
        FrankenlensError: an unknown method.

    Example:
        >>> fl.adjust(np.array([0.01, 0.04, np.nan]))
        array([0.02, 0.04,  nan])
        >>> fl.adjust(np.array([0.01, 0.04, 0.04]), "bh")
        array([0.03, 0.04, 0.04])
    """
    if method not in CORRECTIONS:
        raise FrankenlensError(f"there is no correction {method!r}; choose holm or bh")
    out = np.full(p.shape, np.nan)
    there = ~np.isnan(p)
    if there.any():
        out[there] = CORRECTIONS[method](p[there])
    return out


def examples_for_shares(
    difference: float, discordant: float, *, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Examples that McNemar's test needs to find a difference of two paired shares.

    Source: Connor, "Sample size for testing differences in proportions for the paired-sample design", Biometrics
    1987, equation 3 (normal approximation; the exact test needs a few more).

    Args:
        difference: of the two shares, e.g. 0.05.
        discordant: share of examples on which the two outcomes differ; at least |difference|.
        alpha: two-sided.
        power: chance that the test finds it.

    Raises:
        FrankenlensError: no difference, or one larger than the share of discordant examples.

    Example:
        >>> fl.examples_for_shares(0.10, 0.20)
        155
    """
    if not 0 < abs(difference) <= discordant <= 1:
        raise FrankenlensError(
            f"a difference of {difference} with {discordant} of the examples discordant cannot be: "
            "0 < |difference| <= discordant <= 1"
        )
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    root = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - difference**2)
    return math.ceil((root / difference) ** 2)


def examples_for_mean(mean: float, sd: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Examples that a paired t test needs to find a mean difference, given the differences' standard deviation.

    Raises:
        FrankenlensError: a mean of 0 or a standard deviation that is not positive.

    Example:
        >>> fl.examples_for_mean(0.5, sd=1.0)
        34
    """
    from statsmodels.stats.power import TTestPower

    if mean == 0 or sd <= 0:
        raise FrankenlensError(f"mean {mean} and sd {sd}: the mean must differ from 0 and the sd be positive")
    n = TTestPower().solve_power(abs(mean) / sd, nobs=None, alpha=alpha, power=power)
    return max(2, math.ceil(float(np.ravel(n)[0])))


def _hang_together(values: Float[np.ndarray, " example"], clusters: Clusters) -> bool:
    there = ~np.isnan(values)
    return len(np.unique(np.asarray(clusters)[there])) < int(there.sum())


def _paired(
    after: Real[np.ndarray, " example"], before: Real[np.ndarray, " example"]
) -> tuple[Float[np.ndarray, " kept"], Float[np.ndarray, " kept"]]:
    a, b = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    there = ~(np.isnan(a) | np.isnan(b))
    return a[there], b[there]
