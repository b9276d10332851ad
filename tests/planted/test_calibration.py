"""How often printed intervals cover, and how often tests err: nine shapes of data, n = 8 to 200, and clusters.

The shapes are others than those that the method was chosen on (`interp.statistics.means`). The default suite runs a
part of it; `make calibration` runs all, and prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from interp.hypotheses import one_sided
from interp.hypotheses.one_sided import MIN_TESTED
from interp.statistics import (
    MIN_SHOWN,
    change_interval,
    mean_interval,
    mean_test,
    ratio_interval,
    share_interval,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def _exact_change(n: int, gained: float, lost: float) -> tuple[float, float]:
    """Coverage of `change_interval`, and its mean width, over all tables of n pairs."""
    tables = np.array([(g, k, n - g - k) for g in range(n + 1) for k in range(n + 1 - g)])
    chance = stats.multinomial.pmf(tables, n, [gained, lost, 1 - gained - lost])
    rows = (np.repeat([1.0, -1.0, 0.0], table) for table in tables)
    found = [change_interval(row, np.zeros(n)) for row in rows]
    covers = [bool(one.includes(gained - lost)) for one in found]
    widths = [float(one.high) - float(one.low) for one in found]
    return float(chance @ covers), float(chance @ widths)


@dataclass(frozen=True)
class Shape:
    """Data whose mean is known."""

    draw: Draw
    mean: float


def _tenth(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return rng.normal(0, 0.1, size) + np.where(rng.random(size) < 0.1, rng.gamma(4, 0.25, size), 0.0)


def _some(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return np.where(rng.random(size) < 0.25, rng.exponential(1, size), 0.0)


SHAPES = {
    "normal": Shape(lambda rng, size: rng.normal(0.3, 1, size), 0.3),
    "two humps": Shape(lambda rng, size: rng.normal(0, 0.3, size) + rng.choice([-1, 1], size), 0.0),
    "heavy tails": Shape(lambda rng, size: rng.standard_t(3, size), 0.0),
    "logistic": Shape(lambda rng, size: rng.logistic(0, 1, size), 0.0),
    "exponential": Shape(lambda rng, size: rng.exponential(1, size), 1.0),
    "lognormal": Shape(lambda rng, size: rng.lognormal(0, 1, size), float(np.exp(0.5))),
    "chi-square of 1": Shape(lambda rng, size: rng.chisquare(1, size), 1.0),
    "a tenth carries all": Shape(_tenth, 0.1),
    "a quarter carries all": Shape(_some, 0.25),
}
SYMMETRIC = ("normal", "two humps", "heavy tails", "logistic")
SIZES = (8, 12, 20, 35, 36, 48, 60, 100, 200)
CLUSTERED = ((40, 5), (100, 3))
"""Clusters and examples in each."""


def _coverage(shape: Shape, n: int, draws: int, seed: int) -> tuple[float, float, float]:
    """Share of samples with an interval; of those, how many cover the mean and how many tests reject it."""
    values = shape.draw(np.random.default_rng(seed), (draws, n))
    found = mean_interval(values)
    printed = np.isfinite(found.low)
    if not printed.any():
        return 0.0, np.nan, np.nan
    rejected = mean_test(values - shape.mean)[printed] <= 0.05
    return float(printed.mean()), float(found.includes(shape.mean)[printed].mean()), float(np.mean(rejected))


def _clustered(
    shape: Shape, clusters: int, each: int, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values with an intraclass correlation of .5 (half of their deviation is the cluster's), and their clusters."""
    rng = np.random.default_rng(seed)
    shared = shape.draw(rng, (draws, clusters)).repeat(each, axis=1)
    own = shape.draw(rng, (draws, clusters * each))
    return shape.mean + (shared + own - 2 * shape.mean) / np.sqrt(2), np.repeat(np.arange(clusters), each)


def _check(name: str, n: int, draws: int) -> str:
    shape = SHAPES[name]
    printed, covers, errs = _coverage(shape, n, draws, seed=n)
    if n < MIN_SHOWN:
        assert printed == 0, (name, n)
        return ""
    slack = 2 * np.sqrt(0.05 * 0.95 / draws)
    assert printed > 0.5, (name, n, printed)
    assert 0.92 - slack <= covers <= 0.98 + slack, (name, n, covers)
    assert errs <= 0.07 + slack, (name, n, errs)
    return f"{name:24}{n:5} printed {printed:6.1%} covers {covers:6.1%} errs {errs:6.1%}"


@pytest.mark.parametrize("name", SHAPES)
def test_printed_intervals_cover_and_tests_keep_their_size(name: str) -> None:
    for n in (8, 35, 36, 60, 200):
        _check(name, n, 1500)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_printed_intervals_cover_and_tests_keep_their_size_everywhere(name: str) -> None:
    for n in SIZES:
        print(_check(name, n, 20_000))


@pytest.mark.parametrize("draws", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SHAPES)
def test_clusters_are_what_is_independent(name: str, draws: int) -> None:
    """Five questions about one image: taken for independent they cover three times in four."""
    slack = 2 * np.sqrt(0.05 * 0.95 / draws)
    for clusters, each in CLUSTERED:
        values, of = _clustered(SHAPES[name], clusters, each, draws, seed=clusters)
        found = mean_interval(values, clusters=of)
        printed = np.isfinite(found.low)
        covers = found.includes(SHAPES[name].mean)[printed].mean()
        assert 0.92 - slack <= covers <= 0.98 + slack, (
            name,
            clusters,
            covers,
        )
        assert found.units is not None and (found.units[printed] == clusters).all()
        naive = mean_interval(values)
        assert naive.includes(SHAPES[name].mean).mean() < covers - 0.08
        assert np.isnan(mean_interval(values[:, : 35 * each], clusters=of[: 35 * each]).low).all()


def test_ratios_cover_and_hide_where_the_denominator_is_not_told_from_0() -> None:
    rng = np.random.default_rng(0)
    for mean, hidden in ((2.0, 0.0), (0.5, 0.05), (0.0, 0.9)):
        whole = rng.normal(mean, 1, (2000, 80))
        part = 0.3 * whole + rng.normal(0, 1, whole.shape)
        found = ratio_interval(part, whole)
        printed = np.isfinite(found.low)
        assert abs((~printed).mean() - hidden) <= 0.1
        if mean:
            assert 0.92 <= found.includes(0.3)[printed].mean() <= 0.98


def test_the_interval_is_what_the_test_does_not_reject() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(0, 1, (500, 40)) - np.exp(0.5)
    both = mean_interval(values)
    printed = np.isfinite(both.low)
    assert printed.mean() > 0.95
    np.testing.assert_array_equal(np.isnan(mean_test(values)), ~printed)
    np.testing.assert_array_equal(mean_test(values)[printed] <= 0.05, ~both.includes(0.0)[printed])
    plain = rng.normal(1, 1, 400)
    low, high = stats.t.interval(0.95, 399, plain.mean(), stats.sem(plain))
    found = mean_interval(plain)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


@pytest.mark.parametrize(
    ("gained", "lost", "covers", "width"),
    [(0.3, 0.1, (0.94, 0.96), 1.05), (0.1, 0.02, (0.94, 0.96), 1.15), (0.05, 0.0, (0.95, 0.999), 1.4)],
)
def test_changes_of_right_answers_cover_neither_less_nor_more(gained, lost, covers, width) -> None:
    """Of 60, by all 1,891 tables; the width against that of the normal interval whose spread is known."""
    hit, wide = _exact_change(60, gained, lost)
    assert covers[0] <= hit <= covers[1]
    known = 2 * stats.norm.ppf(0.975) * np.sqrt((gained + lost - (gained - lost) ** 2) / 60)
    assert 0.9 <= wide / known <= width


def test_changes_of_right_answers_cover() -> None:
    rng = np.random.default_rng(0)
    for n in (15, 60, 200):
        for gained, lost in ((0.05, 0.0), (0.1, 0.02), (0.3, 0.1)):
            drawn = rng.choice([1.0, -1.0, 0.0], (400, n), p=[gained, lost, 1 - gained - lost])
            hit = np.mean([bool(change_interval(row, np.zeros(n)).includes(gained - lost)) for row in drawn])
            assert hit >= 0.92, (n, gained, lost, hit)
            few = n * lost < 1  # hardly any answer lost is drawn, if any: wide on purpose, and bounded below
            assert few or hit <= 0.98 + 2 * np.sqrt(0.05 * 0.95 / 400), (n, gained, lost, hit)
    of, share = np.repeat(np.arange(40), 5), 0.7
    own = stats.beta(share, 1 - share).rvs((400, 40), random_state=1)
    right = (rng.random((400, 200)) < own.repeat(5, axis=1)).astype(float)
    assert 0.92 <= np.mean([bool(share_interval(row, of).includes(share)) for row in right]) <= 0.98


SIZES_OF_CLUSTERS = {
    "equal": (5,) * 40,
    "few equal": (4,) * 15,
    "ten large": (20,) * 10 + (1,) * 30,
    "five large": (30,) * 5 + (1,) * 100,
    "three large": (20,) * 3 + (2,) * 57,
    "growing": tuple(range(1, 31)),
}
"""In effect 40, 15, 13, 14, 21 and 23 clusters."""


def _answers(
    rng: np.random.Generator, sizes: tuple[int, ...], share: float, correlation: float, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, in clusters whose own shares are drawn (beta) so that answers of one have this correlation."""
    shape = (draws, len(sizes))
    if correlation in (0.0, 1.0):
        own = np.full(shape, share) if correlation == 0 else (rng.random(shape) < share).astype(float)
    else:
        scale = (1 - correlation) / correlation
        own = rng.beta(share * scale, (1 - share) * scale, shape)
    right = rng.random((draws, sum(sizes))) < own.repeat(sizes, axis=1)
    return right.astype(float), np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("draws", [300, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SIZES_OF_CLUSTERS)
def test_shares_in_clusters_of_unequal_sizes_cover(name: str, draws: int) -> None:
    """With all clusters counted, and the variance between them alone, 50 to 93 % where some are large."""
    sizes, slack = SIZES_OF_CLUSTERS[name], 2 * np.sqrt(0.05 * 0.95 / draws)
    rng = np.random.default_rng(len(name))
    for share in (0.7, 0.9):
        for correlation in (0.0, 0.3, 0.5, 1.0):
            rows, of = _answers(rng, sizes, share, correlation, draws)
            found = [share_interval(row, of) for row in rows]
            hit = np.mean([bool(one.includes(share)) for one in found])
            assert np.isfinite([float(one.low) for one in found]).all()
            assert 0.93 - slack <= hit <= 0.995, (name, share, correlation, hit)
            if draws > 1000:
                print(f"share {share} {name:12} correlation {correlation}: covers {hit:6.1%}")


def test_claims_on_their_bound_err_as_they_say() -> None:
    """One-sided at 5 %, both sides, from the smallest n that gives a verdict."""
    for name, shape in SHAPES.items():
        for n in (MIN_TESTED, 60):
            values = shape.draw(np.random.default_rng(n), (4000, n)) - shape.mean
            for p in one_sided(values):
                assert np.isfinite(p).mean() > 0.99, (name, n)
                assert (p <= 0.05).mean() >= (0.035 if name in SYMMETRIC else 0.005), (name, n)
                assert (p <= 0.05).mean() <= 0.07 + 0.007, (name, n)
