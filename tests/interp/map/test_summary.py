import csv
import math

import numpy as np
import pytest

from hooks.errors import FrankenlensError
from interp.map.summary import READ_OF_CELLS, cell_table, in_words, strongest, summarise
from interp.statistics import mean_interval
from tests.interp.map.synthetic import synthetic_map, synthetic_noise


@pytest.fixture(scope="module")
def summary():
    return summarise(synthetic_map())


def test_recovery_is_the_ratio_of_the_sums(summary):
    cell = {"direction": "rl_to_in", "component": "blocks.6.mlp", "role": "decision"}
    one = summary.sel(cell)
    gap = (summary["donor"] - summary["recipient"]).sel(direction="rl_to_in")
    assert float(one["recovery"]) == pytest.approx(float(one["effect"].sum() / gap.sum()))
    assert float(one["effect_mean"]) == pytest.approx(float(one["effect"].mean()))
    assert one["recovery_low"] < 0.42 < one["recovery_high"]


def test_the_missing_role_of_an_example_is_left_out_of_both_sums(summary):
    one = summary.sel(direction="rl_to_in", component="blocks.2.hook_resid_pre", role="reasoning")
    kept = ~np.isnan(one["effect"].to_numpy())
    assert int(one["n"]) == kept.sum() == 38
    gap = (summary["donor"] - summary["recipient"]).sel(direction="rl_to_in").to_numpy()
    assert float(one["recovery"]) == pytest.approx(float(one["effect"].sum()) / gap[kept].sum())


@pytest.mark.parametrize("missing", READ_OF_CELLS)
def test_a_map_without_what_is_read_of_its_cells_is_refused_by_name(summary, missing):
    with pytest.raises(FrankenlensError, match=f"cells have no {missing}: .* an older one; make it again"):
        strongest(summary.drop_vars(missing), "rl_to_in")
    with pytest.raises(FrankenlensError, match="cells have no effect_mean, effect_mean_low, .*margin"):
        strongest(synthetic_map(), "rl_to_in")


def test_a_role_that_is_empty_throughout_has_n_0_and_no_value(summary):
    one = summary.sel(direction="rl_to_in", component="projector", role="question")
    assert int(one["n"]) == 0
    assert np.isnan([one["recovery"], one["recovery_low"], one["effect_mean"], one["excess"]]).all()


def test_both_directions_recover_although_the_denominator_changes_sign(summary):
    assert summary["denominator"].to_numpy()[0] > 0 > summary["denominator"].to_numpy()[1]
    planted = summary["recovery"].sel(component="blocks.6.mlp", role="decision").to_numpy()
    np.testing.assert_allclose(planted, 0.42, atol=0.05)


def test_the_excess_compares_magnitudes_in_both_directions(summary):
    """Random directions do as much with the other sign: signed, the excess would be twice the effect."""
    at = {"component": "blocks.1.attn", "role": "question"}
    for direction in ("rl_to_in", "in_to_rl"):
        one = summary.sel(at | {"direction": direction})
        assert one["recovery_low"] > 0.2 and one["random_recovery_low"] > 0.2
        assert abs(float(one["excess"])) < 0.05 and one["excess_low"] < 0 < one["excess_high"]
        effect, random = one["effect"].to_numpy(), one["control_random"].to_numpy()
        gap = (one["donor"] - one["recipient"]).to_numpy()
        by_hand = abs(effect.sum()) - np.abs(random.sum(-1)).mean()
        assert float(one["excess"]) == pytest.approx(by_hand / abs(gap.sum()))
        assert not one["beyond"]
        planted = summary.sel(direction=direction, component="blocks.6.mlp", role="decision")
        assert planted["beyond"] and planted["excess_low"] > 0.3


def test_a_cell_must_lie_above_all_cells_of_its_kind_in_noise_pairs():
    effects = synthetic_map()
    noise = synthetic_noise(effects)
    found = summarise(effects, noise=noise)
    floor = found["floor"].sel(role="question")
    attention = found["component"].where(found["point"] == "attn_out", drop=True)
    assert (floor.sel(component=attention) == 1.0).all()  # one cell of one noise pair
    heads = found["component"].where(found["point"] == "head", drop=True)
    own = np.abs(noise["noise_effect"].sel(role="question", component=heads))
    expected = own.max(["noise_pair", "reading", "component"])
    for direction in ("rl_to_in", "in_to_rl"):
        np.testing.assert_allclose(floor.sel(direction=direction, component=heads), float(expected))
    at = {"direction": "rl_to_in", "component": "blocks.6.attn.head.1", "role": "decision"}
    one = found.sel(at)
    assert one["beyond"]
    np.testing.assert_allclose(
        one["margin"],
        abs(one["effect_mean"])
        - max(float(one["floor"]), float(np.abs(one["control_random"].mean("example")).mean())),
    )
    higher = noise.copy(deep=True)
    higher["noise_effect"].loc[{"component": "blocks.0.attn.head.3", "role": "decision"}] = -2.0
    assert not summarise(effects, noise=higher).sel(at)["beyond"]
    unknown = noise.copy(deep=True)
    unknown["noise_effect"].loc[{"component": heads, "role": "decision"}] = np.nan
    assert not summarise(effects, noise=unknown).sel(at)["beyond"]  # none is known


def test_an_infinite_value_is_not_beyond_control_and_tops_no_ranking():
    effects = synthetic_map()
    noise = synthetic_noise(effects)
    at = {"direction": "rl_to_in", "role": "decision"}
    before = summarise(effects, noise=noise).sel(at)
    cells = [f"blocks.6.{one}" for one in ("mlp", "attn.head.1")]
    assert before["beyond"].sel(component=cells).all()
    for name, one in (("effect", cells[0]), ("control_random", cells[1])):
        effects[name].loc[at | {"component": one, "example": effects["example"][3]}] = np.inf
    for given in (noise, None):
        found = summarise(effects, noise=given).sel(at)
        for one in cells:
            cell = found.sel(component=one)
            assert not cell["beyond"]
            assert np.isnan(cell["p_random"]) and np.isnan(cell["margin"])
            assert str(cell["reason"].values) == "an example's value is infinite"
        assert not np.isinf(found["margin"]).any()
    others = [one for one in found["component"].to_numpy() if one not in cells]
    np.testing.assert_array_equal(
        summarise(effects, noise=noise).sel(at)["margin"].sel(component=others),
        before["margin"].sel(component=others),
    )
    table = strongest(summarise(effects, noise=noise), "rl_to_in", k=40)
    assert np.isfinite(table["margin"].iloc[0])
    assert not (table["component"].isin(cells) & (table["role"] == "decision")).any()


def test_a_floor_that_is_infinite_is_none():
    effects = synthetic_map()
    noise = synthetic_noise(effects)
    noise["noise_effect"].loc[
        {"component": "blocks.0.attn.head.3", "role": "decision", "noise_pair": 0, "reading": "own"}
    ] = np.inf
    found = summarise(effects, noise=noise).sel(direction="rl_to_in")
    heads = found["point"].to_numpy() == "head"
    at = found.sel(role="decision")
    for name in ("floor", "margin"):
        np.testing.assert_array_equal(np.isnan(at[name].to_numpy()[heads]), True)
    assert set(at["reason"].to_numpy()[heads]) == {"a noise pair's value is infinite"}
    assert not at["beyond"].to_numpy()[heads].any()
    elsewhere = summarise(effects, noise=synthetic_noise(effects)).sel(direction="rl_to_in")
    np.testing.assert_array_equal(
        at["margin"].to_numpy()[~heads], elsewhere.sel(role="decision")["margin"].to_numpy()[~heads]
    )


def test_whose_change_it_is_stands_in_words(summary):
    for component, words in (
        ("blocks.6.mlp", "as another example's"),
        ("blocks.6.attn.head.1", "more than another example's"),
    ):
        for direction in ("rl_to_in", "in_to_rl"):
            one = summary.sel(direction=direction, component=component, role="decision")
            assert in_words(float(one["p_specific"]), float(one["p_general"])) == words
            own, other = (float(one[name].mean()) for name in ("effect", "control_other"))
            assert (abs(own) > 1.5 * abs(other)) == words.startswith("more")
    assert in_words(0.9, 0.01) == "less than another example's"
    assert in_words(float("nan"), 0.1) == "–"


def test_a_refused_map_holds_no_recovery():
    nulls = {"bf16": mean_interval(np.linspace(-0.1, 0.3, 41)), "random": mean_interval(np.empty(0))}
    found = summarise(synthetic_map(size=0.05), nulls=nulls, refused="too small")
    assert found.attrs["refused"] == "too small"
    assert not found["beyond"].any()
    for name in ("recovery", "random_recovery", "excess", "control_other_recovery", "specific"):
        for suffix in ("", "_low", "_high"):
            assert np.isnan(found[name + suffix]).all()
    assert not np.isnan(found["effect_mean"].sel(role="all", component="blocks.0.mlp")).any()
    assert float(found["null_denominator"].sel(null="bf16")) == pytest.approx(0.1)
    assert (
        found["null_denominator_low"].sel(null="bf16") < 0.1 < found["null_denominator_high"].sel(null="bf16")
    )
    assert np.isnan(found["null_denominator"].sel(null="random"))
    assert strongest(found, "rl_to_in", k=3)["recovery"].isna().all()


def test_strongest(summary):
    table = strongest(summary, "rl_to_in", k=5)
    assert table["component"].tolist()[:2] == ["blocks.6.mlp", "blocks.6.attn.head.1"]
    assert table["role"].tolist()[:2] == ["decision", "decision"]
    assert "blocks.1.attn" not in set(table["component"])  # random directions do as much
    assert (np.diff(table["margin"]) <= 0).all()
    assert len(table) == 5
    assert not set(table["point"]) & {"resid_pre", "z"}


def test_strongest_names_the_directions():
    summary = summarise(synthetic_map(layers=2))
    with pytest.raises(FrankenlensError, match="Did you mean 'rl_to_in'"):
        strongest(summary, "rl_in")


def test_the_table_is_tidy(tmp_path):
    summary = summarise(synthetic_map(layers=3, heads=2, examples=12))
    cell_table(summary).to_csv(tmp_path / "map.csv", index=False)
    rows = list(csv.DictReader((tmp_path / "map.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2 * summary.sizes["component"] * summary.sizes["role"]
    for row in rows[:: len(rows) // 40]:
        cell = summary.sel({name: row[name] for name in ("direction", "component", "role")})
        assert int(row["n"]) == int(cell["n"])
        assert int(row["layer"]) == int(cell["layer"])
        for name in ("recovery", "recovery_low", "excess_high", "control_other_recovery", "denominator"):
            value = float(cell[name])
            assert (row[name] == "") if math.isnan(value) else float(row[name]) == pytest.approx(value)
    assert "effect" not in rows[0]
    assert any(row["n"] == "0" and row["recovery"] == "" for row in rows)
