"""AUROC, precision and ranks against their definitions; claims and visibility by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooks import FrankenlensError
from interp.planting.plots import plot_found
from interp.planting.table import (
    auroc,
    by_effect,
    by_pair,
    found_table,
    invisible,
    null_table,
    precision_at,
    ranks,
)
from interp.planting.trial import TEST, _scored
from interp.statistics import MIN_SHOWN, mean_test, sign_flips

NAN = float("nan")
SCORED = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, NAN]), st.booleans()), min_size=2, max_size=12
)


def _arrays(scored) -> tuple[np.ndarray, np.ndarray]:
    values, changed = zip(*scored, strict=True)
    return np.array(values, dtype=float), np.array(changed, dtype=bool)


@given(SCORED)
def test_auroc_counts_couples(scored) -> None:
    values, changed = _arrays(scored)
    known = np.nan_to_num(values, nan=-1.0)
    couples = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(known[changed], known[~changed])]
    expected = np.mean(couples) if couples else NAN
    assert auroc(values, changed) == pytest.approx(expected, nan_ok=True)
    if couples:  # a rank among n unchanged ones is an AUROC of its own
        mean = 1 - (ranks(values, changed) - 1).mean() / (~changed).sum()
        assert mean == pytest.approx(expected)


@given(SCORED, st.integers(0, 1000))
def test_precision_is_that_of_random_ties(scored, seed) -> None:
    values, changed = _arrays(scored)
    known, k = np.nan_to_num(values, nan=-1.0), int(changed.sum())
    if not k:
        assert np.isnan(precision_at(values, changed))
        return
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(400):
        order = np.lexsort((rng.random(len(known)), -known))
        draws.append(changed[order[:k]].mean())
    assert precision_at(values, changed) == pytest.approx(np.mean(draws), abs=0.15)
    assert min(draws) - 1e-9 <= precision_at(values, changed) <= max(draws) + 1e-9


def _rows(pair: str, kind: str, scores, changed, p, refused="", method="m") -> pd.DataFrame:
    names = [f"c{i}" for i in range(len(scores))]
    table = pd.DataFrame({"component": names, "score": scores, "changed": changed, "p": p, "p_corrected": p})
    held = {"norm_ratio": 1.0, "cosine": 1.0, "noise_ratio": 1.0}
    return table.assign(pair=pair, kind=kind, method=method, refused=refused, **held)


@pytest.fixture
def measured() -> tuple[pd.DataFrame, pd.DataFrame]:
    scores = [
        _rows("rl 0", "rl", [3.0, 0.1, 2.0, 1.0], [True, True, False, False], [0.01, 0.5, 0.02, 0.9]),
        _rows(
            "rl 1",
            "rl",
            [3.0, 5.0, 2.0, NAN],
            [True, True, False, False],
            [0.01, 0.01, 0.9, NAN],
            "too small",
        ),
        _rows("noise 0", "noise", [1.0, 1.0, 1.0, 1.0], [False] * 4, [0.01, 0.9, 0.9, 0.9]),
        _rows("noise 1", "noise", [1.0, 1.0, 1.0, 1.0], [False] * 4, [0.01, 0.9, 0.9, 0.9], "too small"),
        _rows("noise 1", "noise", [1.0] * 4, [False] * 4, [NAN] * 4, method="compare"),
    ]
    noise = [(f"visibility {i}", "", float(i)) for i in range(21)]  # 95th percentile: 19
    plants = [("rl 0", "c0", 190.0), ("rl 0", "c1", 18.0), ("rl 1", "c0", 20.0), ("rl 1", "c1", 38.0)]
    return pd.concat(scores), pd.DataFrame([*noise, *plants], columns=["pair", "component", "effect"])


def test_pairs_are_counted_as_by_hand(measured) -> None:
    scores, plants = measured
    assert plants.loc[invisible(plants), ["pair", "component"]].to_numpy().tolist() == [["rl 0", "c1"]]
    pairs = by_pair(scores, plants).set_index(["pair", "method"])
    first = pairs.loc["rl 0", "m"]
    assert (first["auroc"], first["auroc_visible"], first["precision"]) == (0.5, 1.0, 0.5)
    assert (first["rank"], first["n_visible"], first["claims"], first["found"]) == (2.0, 1, 2, 1)
    second = pairs.loc["rl 1", "m"]
    assert (second["auroc"], second["claims"], second["claims_kept"], second["found"]) == (1.0, 2, 0, 0)
    assert second["found_tested"] == 2
    found = found_table(by_pair(scores, plants)).iloc[0]
    assert (found["auroc"], found["n_changed"], found["n_invisible"]) == (0.75, 4, 1)
    assert found["found"] == pytest.approx(1 / 3)
    null = null_table(by_pair(scores, plants)).set_index("method")
    assert (null.loc["m", "tested"], null.loc["m", "claimed"]) == (1.0, 0.5)
    assert np.isnan(null.loc["compare", "claimed"])


def test_single_plants_are_placed_by_their_effect(measured) -> None:
    alone = by_effect(*measured).set_index(["pair", "component"])
    assert alone.loc[("rl 0", "c0"), "times_noise"] == pytest.approx(10)
    assert alone.loc[("rl 0", "c1"), "auroc"] == 0.0
    assert len(alone) == 4


def test_visibility_needs_noise_pairs(measured) -> None:
    scores, plants = measured
    with pytest.raises(FrankenlensError, match="no noise pair"):
        by_pair(scores, plants.loc[plants["component"] != ""])


def test_noise_that_moves_nothing_is_no_measure(measured) -> None:
    scores, plants = measured
    with pytest.raises(FrankenlensError, match="95th percentile is 0"):
        by_effect(scores, plants.assign(effect=plants["effect"].where(plants["component"] != "", 0.0)))


def test_the_figure_shows_what_the_tables_hold(measured) -> None:
    scores, plants = measured
    pairs = by_pair(scores, plants)
    figure = plot_found(found_table(pairs), null_table(pairs), by_effect(scores, plants))
    grid, alone, nulls, _ = figure.axes
    assert [text.get_text() for text in grid.texts] == ["0.75", "–"]
    assert [text.get_text() for text in alone.texts] == ["1.00", "–"]
    assert [text.get_text() for text in nulls.texts] == ["0.50", "–"]
    assert [label.get_text() for label in grid.get_xticklabels()] == ["rl (2)"]


def test_a_dozen_prompts_are_tested_for_symmetry_because_no_test_of_the_mean_holds_there() -> None:
    """All of one sign: 2 of the 2^12 choices of signs lie as far from 0. Skewed about a mean of 0, it errs."""
    rng = np.random.default_rng(0)
    effects = rng.exponential(1, (45, 12))
    found = _scored(effects, tests=True)
    np.testing.assert_allclose(found["p"], 2 / 2**12, atol=2e-4)  # 2^12 < resamples: exact
    assert np.isnan(mean_test(effects)).all()
    skewed = rng.exponential(1, (1000, 12)) - 1.0
    assert (sign_flips(skewed) <= 0.05).mean() > 0.075  # what `TEST` warns of
    assert "symmetry about 0, not the mean: that takes 36 prompts" in TEST and MIN_SHOWN == 36
