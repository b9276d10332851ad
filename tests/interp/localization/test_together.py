"""All ways of swapping in one table, swaps and ablations in one dataset: counted by hand."""

import numpy as np
import pandas as pd
import xarray as xr

from interp.localization import (
    OUTCOMES,
    FunctionPairs,
    in_one,
    layer_contributions,
    outcome_shares,
    singles,
    suffixes,
    swap_table,
    synthetic_pairs,
)
from interp.localization.plots import CONTRIBUTION
from interp.questions.tasks import sample

LAYERS, N = 3, 12
SWAPS = {"single": singles(LAYERS), "suffix": suffixes(LAYERS)}


def swapped(seed: int) -> xr.Dataset:
    """What `vision_swap` returns, drawn at random; every third pair has the same clean answers."""
    every = list(dict.fromkeys(swap for some in SWAPS.values() for swap in some))
    rng = np.random.default_rng(seed)
    outcome = rng.integers(0, len(OUTCOMES), (len(every), N)).astype(float)
    outcome[:, -1] = np.nan
    return xr.Dataset(
        {
            "outcome": (("swap", "example"), outcome),
            "fault": (("swap", "example"), np.full(outcome.shape, "")),
            "clean": (("side", "example"), np.full((2, N), "4")),
            "differs": ("example", np.arange(N) % 3 > 0),
            "why": ("example", ["", *[""] * (N - 2), "no answer"]),
        },
        coords={
            "swap": [swap.name for swap in every],
            **{name: ("swap", [getattr(swap, name) for swap in every]) for name in ("first", "last", "what")},
            "side": ["target", "source"],
            "example": [f"e{i}" for i in range(N)],
            "function": ("example", ["counting"] * 6 + ["recognition"] * 6),
        },
    )


def test_the_table_has_every_mode_and_kind_of_pairs_and_the_layers_of_suffixes() -> None:
    results = {"counterfactual": swapped(0), "same answer": swapped(1)}
    table = swap_table(results, SWAPS)
    for mode, some in SWAPS.items():
        for kind, among in (("counterfactual", "differing"), ("same answer", "all")):
            own = table.loc[(table["mode"] == mode) & (table["pairs"] == kind)]
            one = results[kind].sel(swap=[swap.name for swap in some])
            expected = outcome_shares(one, among)
            shares = own.loc[own["outcome"] != CONTRIBUTION].reset_index(drop=True)
            pd.testing.assert_frame_equal(shares[list(expected)], expected)
            parts = own.loc[own["outcome"] == CONTRIBUTION]
            assert len(parts) == (LAYERS * 3 if (mode, kind) == ("suffix", "counterfactual") else 0)
            if len(parts):
                layers = layer_contributions(one, among)
                np.testing.assert_array_equal(parts["value"], layers["value"])
                np.testing.assert_array_equal(parts["first"], layers["layer"])
                assert parts["swap"].tolist() == [f"kv {k}-{LAYERS - 1}" for k in layers["layer"]]
                assert set(parts["what"]) == {"kv"}


def test_the_papers_rate_is_over_all_pairs() -> None:
    results = {"counterfactual": swapped(0)}
    n = [
        swap_table(results, SWAPS, among).query("function == 'all'")["n"].max()
        for among in ("differing", "all")
    ]
    assert n == [7, 11]  # of 12, of which one has no outcome


def test_swaps_and_ablations_keep_what_both_have_apart() -> None:
    ablated = xr.Dataset(
        {
            "right": (("ablation", "example"), np.ones((2, 4))),
            "clean": ("example", np.zeros(4)),
            "why": ("example", ["lost"] * 4),
            "fault": (("ablation", "example"), np.full((2, 4), "")),
        },
        coords={"ablation": ["a", "b"], "example": [f"q{i}" for i in range(4)]},
    )
    both = in_one([swapped(0), ablated])
    assert both.sizes["example"] == N and both.sizes["question"] == 4
    assert both["why"].to_numpy()[-1] == "no answer" and set(both["why_question"].to_numpy()) == {"lost"}
    assert (both["clean_right"] == 0).all() and both["clean"].dims == ("side", "example")
    xr.testing.assert_identical(in_one([ablated])["right"], ablated.rename(example="question")["right"])


def test_synthetic_pairs_have_controls_and_may_be_asked_more() -> None:
    found = synthetic_pairs(["count", "exists"], 9, seed=2)
    assert isinstance(found, FunctionPairs)
    assert {target.task for target, _ in found.pairs} == {"counting", "recognition"}
    assert len(found.pairs) == 18 and all(target.answer != source.answer for target, source in found.pairs)
    assert all(target.answer == source.answer for target, source in found.controls["same answer"])
    assert all(target is source for target, source in found.controls["itself"])
    assert len(found.controls["itself"]) == 16  # eight a function
    assert list(found.questions) == [target for target, _ in found.pairs]
    more = sample("sum", 3, 0, "map")
    assert found.asking(more).questions[-3:] == more
    assert len(found.asking(more).examples) == len(found.examples) + 3
