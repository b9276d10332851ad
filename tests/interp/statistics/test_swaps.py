"""The test between what was done and what chance does, against SciPy's permutation test and against its own size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from interp.statistics import swap_test


def _apart(done, random, axis=-1):
    return np.abs(np.mean(done, axis)) - np.abs(np.mean(random, axis))


def test_it_is_scipys_test_of_paired_samples() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.4, 1.0):
        done, random = rng.normal(shift, 1, 11), rng.normal(0, 1, 11)
        exact = stats.permutation_test(
            (done, random), _apart, permutation_type="samples", alternative="greater", n_resamples=10_000
        )
        assert swap_test(done, random[None], swaps=20_000) == pytest.approx(exact.pvalue, abs=0.015)


def test_several_draws_of_chance_change_places_with_what_was_done() -> None:
    """Two draws: by brute force over the 3^5 ways of turning every example's three values."""
    rng = np.random.default_rng(1)
    done, random = rng.normal(0.8, 1, 5), rng.normal(0, 1, (2, 5))
    lanes = np.stack([done, *random])

    def apart(values: np.ndarray) -> float:
        first, *rest = np.abs(values.mean(-1))
        return first - np.mean(rest)

    every = [
        apart(np.stack([np.roll(lanes[:, i], turn) for i, turn in enumerate(turns)], -1))
        for turns in itertools.product(range(3), repeat=5)
    ]
    expected = np.mean(np.array(every) >= apart(lanes) - 1e-12)
    assert swap_test(done, random, swaps=20_000) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("n", [5, 24, 60])
def test_its_size_holds_at_any_n_for_skewed_values_and_clusters(n: int) -> None:
    rng = np.random.default_rng(n)
    for draw in (
        lambda size: rng.normal(0, 1, size),
        lambda size: rng.lognormal(0, 1, size),
        lambda size: np.where(rng.random(size) < 0.1, rng.gamma(4, 0.25, size), rng.normal(0, 0.1, size)),
    ):
        done, random = draw((3000, n)), draw((1, 3000, n))
        assert (swap_test(done, random, swaps=399) <= 0.025).mean() <= 0.025 + 2 * np.sqrt(0.025 / 3000)
    own, of = (rng.normal(0, 1, (2, 2000, n)).repeat(4, -1), np.arange(n).repeat(4))
    clustered = swap_test(own[0], own[1:], clusters=of, swaps=399)
    assert (clustered <= 0.025).mean() <= 0.025 + 2 * np.sqrt(0.025 / 2000)
    if n > 5:
        assert (swap_test(own[0], own[1:], swaps=399) <= 0.025).mean() > 0.05  # taken for four times as many


def test_missing_values_are_left_out_of_both_and_an_empty_cell_has_no_p() -> None:
    rng = np.random.default_rng(2)
    done, random = rng.normal(1, 1, (2, 12)), rng.normal(0, 1, (1, 2, 12))
    holed = done.copy()
    holed[0, :3] = np.nan
    random[0, 0, 3] = np.nan
    holed[1] = np.nan
    found = swap_test(holed, random)
    assert np.isnan(found[1])
    assert found[0] == pytest.approx(float(swap_test(done[0, 4:], random[:, 0, 4:])), abs=0.03)
    assert swap_test(np.zeros(6), np.zeros((1, 6))) == 1.0


def test_a_cell_with_an_infinite_value_has_no_p_and_costs_no_other() -> None:
    rng = np.random.default_rng(3)
    done, random = rng.normal(0, 1, (3, 20)), rng.normal(0, 1, (2, 3, 20))
    alone = swap_test(done[2], random[:, 2])
    done[0, 4], random[1, 1, 7] = np.inf, -np.inf
    for clusters in (None, np.arange(20) // 2):
        found = swap_test(done, random, clusters=clusters)
        np.testing.assert_array_equal(np.isnan(found), [True, True, False])
    assert swap_test(done, random)[2] == alone
