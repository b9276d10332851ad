"""Paired tests against statsmodels, full enumeration and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference
from statsmodels.stats.multitest import multipletests

from hooks import FrankenlensError
from interp.statistics import adjust, examples_for_mean, examples_for_shares, mcnemar, sign_flip

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(OUTCOMES)
def test_mcnemar_is_statsmodels_exact_test(outcomes) -> None:
    after, before = np.array(outcomes, dtype=float).T
    table = [[int(((after == i) & (before == j)).sum()) for j in (1, 0)] for i in (1, 0)]
    found = mcnemar(after, before)
    assert found.n == len(outcomes)
    assert (found.gained, found.lost) == (table[0][1], table[1][0])
    expected: float = reference(table, exact=True).pvalue  # type: ignore[attr-defined]
    assert found.p == pytest.approx(min(1.0, expected))


def test_an_example_without_a_value_is_left_out_of_both_sides() -> None:
    after = np.array([1, 1, np.nan, 0, 1, 1])
    before = np.array([0, np.nan, 1, 0, 0, 1])
    found = mcnemar(after, before)
    assert (found.n, found.gained, found.lost) == (4, 2, 0)
    assert found.p == 0.5
    with pytest.raises(FrankenlensError, match="0, 1 or NaN"):
        mcnemar(np.array([0.5]), np.array([1.0]))


def test_sign_flip_is_the_full_enumeration() -> None:
    rng = np.random.default_rng(0)
    after, before = rng.normal(0.6, 1, 10), rng.normal(size=10)
    differences = after - before
    means = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=10)]
    expected = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert sign_flip(after, before) == pytest.approx(expected)
    assert sign_flip(after, after) == 1.0
    assert np.isnan(sign_flip(np.array([np.nan]), np.array([1.0])))


def test_holm_and_benjamini_hochberg_by_their_definitions() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.5])
    known = np.sort(p[~np.isnan(p)])
    holm = np.maximum.accumulate(known * np.arange(4, 0, -1))
    bh = np.minimum.accumulate((known * 4 / np.arange(1, 5))[::-1])[::-1]
    for method, expected in (("holm", holm), ("bh", bh)):
        found = adjust(p, method)
        assert np.isnan(found[2])
        np.testing.assert_allclose(np.sort(found[~np.isnan(found)]), np.minimum(expected, 1))
    tied = np.array([0.2, 0.01, 0.3, 0.01, 0.2, 0.9])
    for method, theirs in (("holm", "holm"), ("bh", "fdr_bh")):
        np.testing.assert_array_equal(adjust(tied, method), tuple(multipletests(tied, method=theirs))[1])
    with pytest.raises(FrankenlensError, match="holm or bh"):
        adjust(p, "none")


def test_the_number_of_examples_gives_the_power_it_promises() -> None:
    difference, discordant = 0.08, 0.2
    n = examples_for_shares(difference, discordant)
    rng = np.random.default_rng(1)
    gained = (discordant + difference) / 2
    draws = rng.multinomial(n, [gained, discordant - gained, 1 - discordant], size=2000)
    found = [bool(stats.binomtest(int(g), int(g + lost)).pvalue < 0.05) for g, lost, _ in draws]
    assert 0.74 < np.mean(found) < 0.84
    n = examples_for_mean(0.3, 1.0)
    values = rng.normal(0.3, 1, (4000, n))
    p = np.asarray(tuple(stats.ttest_1samp(values, 0, axis=1))[1])
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.03)
    with pytest.raises(FrankenlensError, match="cannot be"):
        examples_for_shares(0.3, 0.2)
