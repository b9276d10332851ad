"""Intervals of shares and of changes of them, against SciPy and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from interp.statistics import Interval, change_interval, share_interval


def _ends(found: Interval) -> tuple[float, float]:
    return float(found.low), float(found.high)


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    """The two roots of (share - p)^2 = z^2 p (1 - p) / n."""
    roots = np.roots([1 + z**2 / n, -(2 * share + z**2 / n), share**2])
    low, high = sorted(roots.real.tolist())
    return low, high


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("right", "n"), [(0, 12), (1, 40), (9, 10), (37, 60), (480, 1000)])
def test_a_share_of_independent_answers_has_wilsons_interval(right: int, n: int, confidence: float) -> None:
    answers = np.r_[np.ones(right), np.zeros(n - right), np.nan]
    expected = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    found = share_interval(answers, confidence=confidence)
    assert _ends(found) == pytest.approx((float(expected.low), float(expected.high)), abs=1e-12)
    assert (float(found.value), int(found.n)) == (right / n, n)


@pytest.mark.parametrize(("gained", "lost", "n"), [(7, 3, 40), (12, 9, 60), (30, 4, 200), (5, 5, 36)])
def test_a_change_of_independent_answers_has_agresti_and_mins_interval(
    gained: int, lost: int, n: int
) -> None:
    """From the table of paired answers with half an answer more in each of its four cells."""
    both, neither = (n - gained - lost) // 2, n - gained - lost - (n - gained - lost) // 2
    before = np.repeat([1.0, 0.0, 0.0, 1.0], [both, neither, gained, lost])
    after = np.repeat([1.0, 0.0, 1.0, 0.0], [both, neither, gained, lost])
    table = (np.array([[both, lost], [gained, neither]]) + 0.5) / (n + 2)
    of_after, of_before = table[:, 0].sum(), table[0].sum()
    variance = of_after * (1 - of_after) + of_before * (1 - of_before)
    variance -= 2 * (table[0, 0] * table[1, 1] - table[0, 1] * table[1, 0])  # of two dependent shares
    half = stats.norm.ppf(0.975) * math.sqrt(variance / (n + 2))
    found = change_interval(after, before)
    assert _ends(found) == pytest.approx(
        (of_after - of_before - half, of_after - of_before + half), abs=1e-12
    )
    assert float(found.value) == pytest.approx((gained - lost) / n)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_change_one_way_only_is_no_narrower_than_wilsons_of_its_share(sign: float) -> None:
    change = sign * np.r_[np.ones(3), np.zeros(57)]
    wilson: Any = stats.binomtest(3, 60).proportion_ci(0.95, method="wilson")
    low, high = _ends(change_interval(change, np.zeros(60)))
    ends = (low, high) if sign > 0 else (-high, -low)
    centre, spread = 3 / 62, math.sqrt(4 - 9 / 62) / 62  # 3.5 gained and 0.5 lost of 62
    plain = [centre + side * stats.norm.ppf(0.975) * spread for side in (-1, 1)]
    assert ends == pytest.approx((min(plain[0], wilson.low), max(plain[1], wilson.high)), abs=1e-12)
    assert wilson.high > plain[1]


def test_answers_that_are_alike_in_a_cluster_count_once() -> None:
    """Equal clusters, each of one mind: the variance of a share of G is G / (G - 1) of p (1 - p) / G."""
    own = np.r_[np.ones(28), np.zeros(12)]
    found = share_interval(own.repeat(5), np.arange(40).repeat(5))
    assert _ends(found) == pytest.approx(_wilson(0.7, 39, float(stats.t.ppf(0.975, 39))), abs=1e-9)
    assert (int(found.n), int(found.units or 0)) == (200, 40)


def test_clusters_of_unequal_sizes_count_as_many_as_there_are_in_effect() -> None:
    """3 of 20 beside 57 of 2, each of one mind: 174^2 / (3 * 400 + 57 * 4) = 21.2 in effect."""
    sizes = np.r_[np.full(3, 20), np.full(57, 2)]
    of = np.repeat(np.arange(60), sizes)
    in_effect = 174**2 / (3 * 400 + 57 * 4)
    quantile = float(stats.t.ppf(0.975, in_effect - 1))
    all_right = share_interval(np.ones(174), of)
    assert _ends(all_right) == pytest.approx((in_effect / (in_effect + quantile**2), 1.0), abs=1e-12)
    own = np.r_[np.ones(2), 0, np.ones(40), np.zeros(17)]  # 120 of 174 right, two large clusters of three
    share = 120 / 174
    residuals = sizes * (own - share)
    effective = (
        share * (1 - share) / max(share * (1 - share) / in_effect, 60 / 59 * (residuals**2).sum() / 174**2)
    )
    found = share_interval(own[of], of)
    assert _ends(found) == pytest.approx(_wilson(share, effective, quantile), abs=1e-9)


def test_few_clusters_in_effect_have_no_interval() -> None:
    of = np.repeat(np.arange(61), [60, *[1] * 60])  # 120^2 / (3600 + 60) = 3.9
    right = np.tile([1.0, 0.0, 1.0], 40)
    for found in (
        share_interval(right, of),
        share_interval(np.ones(120), of),
        change_interval(right, right, of),
    ):
        assert np.isnan(_ends(found)).all() and np.isfinite(float(found.value))
        assert "in effect there are fewer than 10" in str(found.reason)
    assert "fewer than 10 independent" in str(share_interval(right, np.arange(120) // 15).reason)


def test_of_clusters_without_a_change_the_exact_bound_counts_those_in_effect() -> None:
    """Sizes 4 and 1: what 20 large and 20 small clusters do not show, (100^2 / 340 of them) may be missing."""
    of = np.repeat(np.arange(40), np.tile([4, 1], 20))
    found = change_interval(np.zeros(100), np.zeros(100), of)
    unseen = 1 - 0.025 ** (340 / 100**2)
    assert _ends(found) == pytest.approx((-unseen, unseen), abs=1e-12)
