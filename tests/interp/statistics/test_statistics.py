import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from interp.statistics import (
    MIN_EXAMPLES,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    interval_text,
    wilson_interval,
)

FINITE = st.floats(-100, 100, allow_nan=False, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


def _data(n=40, seed=0):
    rng = np.random.default_rng(seed)
    denominator = rng.gamma(2.0, 1.0, n)
    return 0.3 * denominator + rng.normal(0, 0.5, n), denominator


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_ratio_agrees_with_scipy(method):
    top, bottom = _data()
    ours = bootstrap_ratio(top, bottom, resamples=20_000, method=method)
    scipy = stats.bootstrap(
        (top, bottom),
        lambda x, y, axis: x.sum(axis) / y.sum(axis),
        paired=True,
        n_resamples=20_000,
        method=method,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours.value == pytest.approx(top.sum() / bottom.sum(), rel=1e-12)
    width = scipy.high - scipy.low
    assert ours.low == pytest.approx(scipy.low, abs=0.03 * width)
    assert ours.high == pytest.approx(scipy.high, abs=0.03 * width)


def test_mean_is_near_the_t_interval():
    values = np.random.default_rng(3).normal(2.0, 1.0, 200)
    ours = bootstrap_mean(values, resamples=10_000)
    t = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == (pytest.approx(t[0], abs=0.01), pytest.approx(t[1], abs=0.01))


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, 100)
    found = bootstrap_difference(shared + 1 + rng.normal(0, 0.1, 100), shared)
    assert 0.9 < found.low < found.value < found.high < 1.1


def test_many_cells_equal_single_cells_whatever_is_missing():
    rng = np.random.default_rng(0)
    top, bottom = rng.normal(size=(2, 5, 3, 12)), rng.gamma(2.0, size=(2, 1, 1, 12))
    top[rng.random(top.shape) < 0.3] = np.nan
    top[1, 2, 0] = np.nan
    many = bootstrap_ratio(top, bottom, resamples=300)
    for cell in np.ndindex(top.shape[:-1]):
        kept = ~np.isnan(top[cell])
        one = bootstrap_ratio(top[cell][kept], bottom[cell[0], 0, 0][kept], resamples=300)
        for name in ("value", "low", "high", "n"):
            np.testing.assert_allclose(getattr(many, name)[cell], getattr(one, name), rtol=1e-9)
    assert many.n[1, 2, 0] == 0
    assert np.isnan(many.value[1, 2, 0])


def test_blocks_of_cells_do_not_change_the_result(monkeypatch):
    top, bottom = np.random.default_rng(0).normal(size=(50, 20)), np.ones(20)
    whole = bootstrap_ratio(top, bottom)
    monkeypatch.setattr("interp.statistics.intervals._CHUNK", 3 * 2000)
    parts = bootstrap_ratio(top, bottom)
    np.testing.assert_allclose(parts.low, whole.low, rtol=1e-12)
    np.testing.assert_allclose(parts.high, whole.high, rtol=1e-12)


def test_no_examples_is_nan_and_never_zero():
    for top in (np.empty((3, 0)), np.full((3, 4), np.nan)):
        found = bootstrap_ratio(top, np.ones(top.shape[-1]))
        assert found.n.tolist() == [0, 0, 0]
        assert np.isnan([found.value, found.low, found.high]).all()
        assert not found.includes(0.0).any()


@pytest.mark.parametrize("n", [1, MIN_EXAMPLES - 1])
def test_few_examples_have_a_value_and_no_interval(n):
    found = bootstrap_ratio(np.arange(1.0, n + 1), 2 * np.arange(1.0, n + 1))
    assert found.value == 0.5
    assert found.n == n
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def test_a_zero_denominator_is_nan():
    found = bootstrap_ratio(np.array([1.0, 2.0, 3.0]), np.zeros(3))
    assert np.isnan([found.value, found.low, found.high]).all()


def test_missing_denominators_leave_the_example_out():
    found = bootstrap_ratio(np.array([1.0, 5.0, 3.0]), np.array([2.0, np.nan, 2.0]))
    assert (found.value, found.n) == (1.0, 2)


@given(
    top=arrays(np.float64, st.integers(MIN_EXAMPLES, 14), elements=FINITE),
    scale=st.floats(0.01, 100),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_interval_scales_and_does_not_depend_on_the_order_of_signs(top, scale, seed):
    bottom = np.linspace(1, 2, len(top))
    found = bootstrap_ratio(top, bottom, resamples=200, seed=seed)
    assert found.low <= found.high
    scaled = bootstrap_ratio(top * scale, bottom, resamples=200, seed=seed, method="percentile")
    plain = bootstrap_ratio(top, bottom, resamples=200, seed=seed, method="percentile")
    np.testing.assert_allclose(
        [scaled.low, scaled.high], [plain.low * scale, plain.high * scale], rtol=1e-6, atol=1e-9
    )
    mirrored = bootstrap_ratio(-top, bottom, resamples=200, seed=seed, method="percentile")
    np.testing.assert_allclose([-mirrored.high, -mirrored.low], [plain.low, plain.high], rtol=1e-6, atol=1e-9)


@given(constant=FINITE, n=st.integers(MIN_EXAMPLES, 20))
@settings(max_examples=20, deadline=None)
def test_proportional_data_has_an_interval_of_no_width(constant, n):
    bottom = np.linspace(1, 3, n)
    found = bootstrap_ratio(constant * bottom, bottom, resamples=100)
    np.testing.assert_allclose([found.value, found.low, found.high], constant, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_the_interval_covers_the_truth_as_often_as_it_says(method):
    rng = np.random.default_rng(0)
    bottom = rng.gamma(2.0, 1.0, (600, 60))
    top = 0.3 * bottom + rng.normal(0, 1, bottom.shape)  # true ratio of expectations: 0.3
    found = bootstrap_ratio(top, bottom, resamples=500, method=method)
    assert 0.91 <= found.includes(0.3).mean() <= 0.98


def test_wilson_closed_form():
    z = stats.norm.ppf(0.975)
    for k, n in ((0, 10), (7, 10), (10, 10), (480, 1000)):
        p = k / n
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        found = wilson_interval(k, n)
        assert (found.value, found.n) == (p, n)
        assert (found.low, found.high) == (
            pytest.approx(centre - half, abs=1e-12),
            pytest.approx(centre + half, abs=1e-12),
        )


def test_wilson_without_trials_and_with_too_many_successes():
    assert np.isnan(wilson_interval(0, 0).value)
    assert wilson_interval(0, 0).n == 0
    with pytest.raises(ValueError, match="k"):
        wilson_interval(3, 2)


def test_text_for_people():
    assert interval_text(2.914, -0.5, 3.2) == "2.91 [−0.50, 3.20]"
    assert interval_text(-0.0213, -0.04, -0.0004) == "−0.021 [−0.040, −0.000]"
    assert interval_text(1.5, np.nan, np.nan) == "1.5 [no interval]"
    assert interval_text(np.nan, np.nan, np.nan) == "–"


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.00012, 0.00003, 0.00021, "0.00012 [0.00003, 0.00021]"),
        (-0.0003, -0.0042, 0.0035, "−0.0003 [−0.0042, 0.0035]"),
        (0.00012, -0.5, 0.5, "0.00 [−0.50, 0.50]"),
        (0.0, 0.0, 0.0, "0.000 [0.000, 0.000]"),
        (3e-9, -1e-9, 4.26e-8, "3.0e−09 [−1.0e−09, 4.3e−08]"),
        (12.3456, 11.0, 13.0, "12.35 [11.00, 13.00]"),
        (12.3456, np.nan, np.nan, "12.35 [no interval]"),
        (0.0123, np.nan, np.nan, "0.012 [no interval]"),
        (0.000123, np.nan, np.nan, "0.00012 [no interval]"),
        (1200.0, np.nan, np.nan, "1200 [no interval]"),
        (0.0, np.nan, np.nan, "0 [no interval]"),
    ],
)
def test_digits_follow_the_magnitude_with_and_without_an_interval(value, low, high, text):
    assert interval_text(value, low, high) == text


@given(st.floats(1e-6, 1e6), st.floats(0, 1))
def test_two_digits_of_the_largest_count(largest, share):
    value, high = (
        float(part.strip("[],")) for part in interval_text(share * largest, 0, largest).split()[::2]
    )
    assert abs(high - largest) <= 0.05 * largest and abs(value - share * largest) <= 0.05 * largest


def test_overlap():
    a, b = bootstrap_mean(np.arange(10.0)), bootstrap_mean(np.arange(10.0) + 100)
    assert a.overlaps(a)
    assert not a.overlaps(b)
