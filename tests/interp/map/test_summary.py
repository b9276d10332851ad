import csv
import math

import numpy as np
import pytest

from hooks.errors import FrankenlensError
from interp.map.summary import cell_table, strongest, summarise
from interp.statistics import mean_interval
from tests.interp.map.synthetic import synthetic_map


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


def test_a_role_that_is_empty_throughout_has_n_0_and_no_value(summary):
    one = summary.sel(direction="rl_to_in", component="projector", role="question")
    assert int(one["n"]) == 0
    assert np.isnan([one["recovery"], one["recovery_low"], one["effect_mean"], one["excess"]]).all()


def test_both_directions_recover_although_the_denominator_changes_sign(summary):
    assert summary["denominator"].to_numpy()[0] > 0 > summary["denominator"].to_numpy()[1]
    planted = summary["recovery"].sel(component="blocks.6.mlp", role="decision").to_numpy()
    np.testing.assert_allclose(planted, 0.42, atol=0.05)


def test_the_excess_shows_an_equally_strong_control(summary):
    at = {"direction": "rl_to_in", "component": "blocks.1.attn", "role": "question"}
    one = summary.sel(at)
    assert one["recovery_low"] > 0.2
    assert one["excess_low"] < 0 < one["excess_high"]


def test_a_refused_map_holds_no_recovery():
    nulls = {"bf16": mean_interval(np.linspace(-0.1, 0.3, 9)), "random": mean_interval(np.empty(0))}
    found = summarise(synthetic_map(size=0.05), nulls=nulls, refused="too small")
    assert found.attrs["refused"] == "too small"
    for name in ("recovery", "excess", "control_other_recovery"):
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
    assert table["component"].tolist()[:3] == ["blocks.6.mlp", "blocks.1.attn", "blocks.6.attn.head.1"]
    assert table["role"].tolist()[:3] == ["decision", "question", "decision"]
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
