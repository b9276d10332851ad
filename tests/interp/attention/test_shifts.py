"""Every comparison of the attention shift in one table, on planted attention."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from interp.attention import plot_shift, shift, shifts
from interp.attention.shift import NULLS, PAIR
from interp.regions import thirds

LAYERS, HEADS, N = 3, 2, 10
ADDED = {"in": 0.0, "rl": 0.3, "bf16": 0.31, "random": -0.02}


@pytest.fixture
def found() -> xr.Dataset:
    """Models that differ by a constant, on traces that differ by another."""
    rng = np.random.default_rng(0)
    own = rng.uniform(0.1, 0.2, (2, LAYERS, HEADS, N)) + np.array([0.0, 0.05])[:, None, None, None]
    mass = np.stack([own + added for added in ADDED.values()])
    return xr.Dataset(
        {
            "mass": (("model", "trace", "layer", "head", "example"), mass),
            "n_source": (("trace", "example"), np.full((2, N), 16)),
        },
        coords={"model": list(ADDED), "trace": ["in", "rl"], "layer": range(LAYERS), "head": range(HEADS)},
    )


def test_the_pair_and_each_null_against_the_model_it_was_made_from(found) -> None:
    table = shifts(found, per="layer", measure="mass", correction="holm")
    assert list(table)[:3] == ["traces", "comparison", "measure"]
    assert table.groupby("comparison", sort=False)["traces"].unique().map(list).to_dict() == {
        PAIR: ["own", "in", "rl"],
        NULLS["bf16"][1]: ["in", "rl"],
        NULLS["random"][1]: ["in", "rl"],
    }
    for comparison, expected in ((PAIR, 0.3), (NULLS["bf16"][1], 0.01), (NULLS["random"][1], -0.02)):
        some = table.loc[(table["comparison"] == comparison) & (table["traces"] != "own")]
        np.testing.assert_allclose(some["difference"], expected)
    own = table.loc[(table["comparison"] == PAIR) & (table["traces"] == "own")].reset_index(drop=True)
    expected = shift(found, "own")
    pd.testing.assert_frame_equal(own[list(expected)], expected)
    assert (own["difference"] > 0.3).all()  # and what the traces differ by


def test_nulls_that_are_not_there_have_no_rows_and_the_mean_is_a_share_of_the_mass(found) -> None:
    mass, mean = (
        shifts(found.sel(model=["in", "rl"]), per="head", measure=name) for name in ("mass", "mean")
    )
    assert set(mass["comparison"]) == {PAIR} and len(mass) == 3 * LAYERS * HEADS
    np.testing.assert_allclose(mass["difference"] / 16, mean["difference"])
    assert set(mean["measure"]) == {"mean"}
    assert plot_shift(shifts(found, per="layer"), thirds(LAYERS)).axes
