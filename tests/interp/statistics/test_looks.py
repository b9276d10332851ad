"""Looks at a growing sample, against the normal distribution of the sums at each look."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hooks import FrankenlensError
from interp.statistics import levels, over_looks


def _spent(share: float, alpha: float) -> float:
    """O'Brien and Fleming's kind, as Lan and DeMets give it."""
    return float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(share)))


def _ever(shares: tuple[float, ...], bounds: np.ndarray) -> float:
    """The chance that any of the standardized sums of a true null lies above its bound, by SciPy."""
    correlation = [[math.sqrt(min(a, b) / max(a, b)) for b in shares] for a in shares]
    joint: Any = stats.multivariate_normal
    exactly = {"abseps": 1e-7, "releps": 1e-7, "maxpts": 2_000_000}
    return 1 - float(joint.cdf(bounds, np.zeros(len(shares)), correlation, **exactly))


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize(
    "shares",
    [
        (0.25, 1.0),
        (0.2, 0.3, 0.9),
        (0.5, 0.5002),  # one prompt more of 5,000
        (0.5, 0.5001),  # of 10,000
        (0.9998, 1.0),
        (0.5, 0.55, 0.6),
    ],
)
def test_all_looks_together_err_as_often_as_was_spent(shares: tuple[float, ...], alpha: float) -> None:
    found = levels(shares, alpha)
    for upto in range(1, len(shares) + 1):
        bounds = stats.norm.isf(found[:upto])
        assert _ever(shares[:upto], bounds) == pytest.approx(_spent(shares[upto - 1], alpha), abs=2e-6)


def test_looks_that_lie_nearer_than_can_be_reckoned_are_refused() -> None:
    with pytest.raises(FrankenlensError, match="apart; let the sample grow by 0.0001"):
        levels((0.5, 0.50003), 0.05)
    with pytest.raises(FrankenlensError, match="they rise"):
        levels((0.5, 0.5), 0.05)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_p_of_one_early_look_is_the_alpha_that_would_have_been_spent(share: float) -> None:
    p = np.array([1e-4, 0.003, 0.05, 0.3, np.nan])
    found = over_looks(p, (share,))
    assert np.isnan(found[-1])
    np.testing.assert_allclose([_spent(share, alpha) for alpha in found[:-1]], p[:-1], rtol=1e-6)


@pytest.mark.parametrize("shares", [(0.3, 0.6), (0.25, 0.5, 0.75, 1.0)])
def test_the_p_of_later_looks_rejects_at_alpha_where_the_level_does(shares: tuple[float, ...]) -> None:
    for alpha in (0.002, 0.03, 0.05, 0.11):
        last = float(levels(shares, alpha)[-1])
        assert float(over_looks(np.array(last), shares)) == pytest.approx(alpha, rel=2e-3)
    assert float(over_looks(np.array(0.999), shares)) == 1.0


def test_two_looks_err_as_one_by_simulation() -> None:
    """Sums of normals at a third and at all: rejected in one sample of twenty, uncorrected in one of twelve."""
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 1, (200_000, 2)) * np.sqrt([1 / 3, 2 / 3])
    p = stats.norm.sf(steps.cumsum(1) / np.sqrt([1 / 3, 1]))
    ever = (over_looks(p[:, 0], (1 / 3,)) <= 0.05) | (over_looks(p[:, 1], (1 / 3, 1.0)) <= 0.05)
    assert ever.mean() == pytest.approx(0.05, abs=0.0015)
    assert (p <= 0.05).any(1).mean() > 0.075
