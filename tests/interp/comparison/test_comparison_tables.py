"""Layers, regions, addresses and heads of a comparison add up to its tensors, whatever the numbers are."""

from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from experiments import embedded
from hooks.errors import FrankenlensError
from interp.comparison import (
    Checkpoint,
    aggregate,
    by_address,
    compare,
    layers,
    regions,
    spectra,
    trends,
    with_regions,
)
from interp.comparison.plots import plot_directions, plot_energy, plot_spectra
from interp.regions import parse_partition, thirds
from tests.families import EACH_KIND, redraw, tiny
from tests.interp.statistics.plain_interval import plain_interval

FOLDERS = (embedded.path("in"), embedded.path("rl"), embedded.path("base"))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return compare(*FOLDERS, subspace=8, progress=False)


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for stage in embedded.STAGES:
        model = AutoModelForImageTextToText.from_pretrained(embedded.path(stage))
        found[stage] = {name: p.detach().double() for name, p in model.named_parameters()}
    return found


def _made_up(norms: list[float], groups: list[int]) -> pd.DataFrame:
    """Two stages of tensors; the second's update is the first's, turned by an angle that differs per tensor."""
    frame = pd.DataFrame({"fro_norm": norms, "group": groups, "stage": "in"})
    turned = frame.assign(stage="rl", fro_norm=2 * frame["fro_norm"])
    both = pd.concat([frame, turned], ignore_index=True)
    cosine = np.cos(np.arange(len(frame)))
    product = np.tile(cosine * frame["fro_norm"] * turned["fro_norm"], 2)
    filled = dict(reference_norm=3.0, relative_norm=1.0, rounding_norm=0.1, mean_abs=0.1, max_abs=1.0)
    entries = np.tile(np.arange(1, len(frame) + 1), 2)
    return both.assign(
        **filled,
        n=entries,
        sparsity=0.25,
        sparsity_random=0.2,
        columns=4,
        scalar_product=product,
        sparsity_type="bfloat16",
    )


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(0, 3)), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None)
def test_a_groups_norm_is_the_root_of_the_sum_of_squares(drawn) -> None:
    norms, groups = [one for one, _ in drawn], [group for _, group in drawn]
    made = _made_up(norms, groups)
    found = aggregate(made, ["group"]).set_index(["group", "stage"])
    for at, row in found.iterrows():
        group, stage = cast(tuple[int, str], at)
        some = made[(made["group"] == group) & (made["stage"] == stage)]
        assert row["fro_norm"] == pytest.approx(np.linalg.norm(some["fro_norm"]))
        assert row["mean_norm"] == pytest.approx(some["fro_norm"].mean())
        assert row["sum_norm"] == pytest.approx(some["fro_norm"].sum())
        assert row["n"] == some["n"].sum() and row["n_tensors"] == len(some)
        other = np.linalg.norm(made.loc[(made["group"] == group) & (made["stage"] != stage), "fro_norm"])
        assert row["cosine"] == pytest.approx(some["scalar_product"].sum() / (row["fro_norm"] * other))
    whole = aggregate(made).set_index("stage")
    for stage in ("in", "rl"):
        parts = found.xs(stage, level="stage")
        assert np.linalg.norm(parts["fro_norm"]) == pytest.approx(whole.loc[stage, "fro_norm"])
        assert parts["energy_share"].sum() == pytest.approx(1)
        assert parts["entries_share"].sum() == pytest.approx(1)
    assert aggregate(made.loc[made["stage"] == "rl"], ["group"])["cosine"].isna().all()


def test_layers_and_regions_are_numpys_norms_of_their_parameters(table, weights) -> None:
    """Each parameter in exactly one layer and one region, and norm, cosine and sparsity of all its entries together."""
    partition = thirds(9)
    by_layer = layers(table).set_index(["stage", "layer"])
    for layer, prefix in (
        ("blocks.4", "model.language_model.layers.4."),
        ("vision.blocks.1", "model.visual.blocks.1."),
        ("projector", "model.visual.merger."),
        ("embed", "model.language_model.embed_tokens."),
        ("vision (rest)", "model.visual.patch_embed."),
    ):
        base, in_, rl = (
            torch.cat([w.flatten() for name, w in weights[stage].items() if name.startswith(prefix)]).numpy()
            for stage in embedded.STAGES
        )
        for stage, delta, pair in (("in", in_ - base, (base, in_)), ("rl", rl - in_, (in_, rl))):
            row = by_layer.loc[(stage, layer)]
            assert row["fro_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
            assert row["relative_norm"] == pytest.approx(
                np.linalg.norm(delta) / np.linalg.norm(in_), rel=1e-5
            )
            assert row["n"] == len(delta)
            one, two = (torch.from_numpy(w).bfloat16() for w in pair)
            assert row["sparsity"] == pytest.approx(float((one == two).double().mean()))
            cosine = (in_ - base) @ (rl - in_) / np.linalg.norm(in_ - base) / np.linalg.norm(rl - in_)
            assert row["cosine"] == pytest.approx(cosine, abs=1e-6)
    for found in (layers(table), regions(table, partition)):
        for stage, some in found.groupby("stage"):
            assert some["n"].sum() == sum(w.numel() for w in weights["in"].values())
            assert np.linalg.norm(some["fro_norm"]) == pytest.approx(
                np.linalg.norm(table.loc[table["stage"] == stage, "fro_norm"])
            )
    mid = regions(table, partition).set_index(["stage", "region"]).loc[("rl", "Mid")]
    blocks = [by_layer.loc[("rl", f"blocks.{i}"), "fro_norm"] for i in (3, 4, 5)]
    assert mid["fro_norm"] == pytest.approx(np.linalg.norm(blocks))


def test_the_unified_index_runs_from_vision_to_the_last_decoder_layer(table) -> None:
    some = layers(table)
    index = some.loc[some["stage"] == "rl"].set_index("layer")["unified_index"]
    wanted = {"vision.blocks.0": -4, "vision.blocks.2": -2, "projector": -1, "blocks.0": 0, "blocks.8": 8}
    assert {name: index[name] for name in wanted} == wanted
    assert index[["embed", "ln_final", "vision (rest)"]].isna().all()


def test_partitions_of_another_depth_and_unknown_columns_are_refused(table) -> None:
    with pytest.raises(FrankenlensError, match="covers layers 0-27; the model has 9"):
        regions(table, thirds(28))
    with pytest.raises(FrankenlensError, match="no column 'colour'"):
        aggregate(table, ["colour"])
    assert list(regions(table, parse_partition("2/7", 9))["region"].unique())[-2:] != ["Mid", "Late"]


def test_a_head_is_its_rows_of_q_and_its_columns_of_o(table, weights) -> None:
    found = by_address(table, *FOLDERS, progress=False).set_index(["stage", "address"])
    attention = "model.language_model.layers.6.self_attn"
    d, head = 32, slice(2 * 32, 3 * 32)

    def owned(stage: str) -> np.ndarray:
        w = {name: weights[stage][f"{attention}.{name}"] for name in ("q_proj.weight", "q_proj.bias")}
        parts = [w["q_proj.weight"][head], w["q_proj.bias"][head]]
        parts.append(weights[stage][f"{attention}.o_proj.weight"][:, head])
        return torch.cat([part.flatten() for part in parts]).numpy()

    base, in_, rl = map(owned, embedded.STAGES)
    row = found.loc[("rl", "blocks.6.attn.head.2")]
    assert row["n"] == len(rl) == d * 128 + d + 128 * d
    assert row["fro_norm"] == pytest.approx(np.linalg.norm(rl - in_), rel=1e-9)
    assert row["reference_norm"] == pytest.approx(np.linalg.norm(in_), rel=1e-9)
    product = (in_ - base) @ (rl - in_)
    assert row["cosine"] == pytest.approx(product / np.linalg.norm(in_ - base) / np.linalg.norm(rl - in_))
    same = torch.from_numpy(in_).bfloat16() == torch.from_numpy(rl).bfloat16()
    assert row["sparsity"] == pytest.approx(float(same.double().mean()))


@pytest.mark.parametrize("family", EACH_KIND)
def test_heads_add_up_to_their_attention(family: str, tmp_path) -> None:
    """Heads and kv heads hold all of an attention but output biases and norms of q and k, in every family."""
    model = tiny(family).model
    model.save_pretrained(tmp_path / "in")
    redraw(model, 5)
    model.save_pretrained(tmp_path / "rl")
    in_, rl = Checkpoint(tmp_path / "in"), Checkpoint(tmp_path / "rl")
    table = compare(in_, rl, spectra=False, progress=False)
    found = by_address(table, in_, rl, progress=False)
    energy = found.assign(squares=found["fro_norm"] ** 2)
    parts = energy[energy["part"].isin(["head", "kv_head"])]
    for at, some in parts.groupby(["section", "layer_index"]):
        section, layer = cast(tuple[str, int], at)
        tensors: Any = table.loc[(table["section"] == section) & (table["layer_index"] == layer)]
        inside = tensors[
            tensors["component"].isin(list("qkvo") + ["qkv"] + [f"{one}_bias" for one in (*"qkv", "qkv")])
        ]
        assert some["squares"].sum() == pytest.approx((inside["fro_norm"] ** 2).sum(), rel=1e-5)
        assert some["n"].sum() == inside["n"].sum()
    whole = energy[energy["part"].isin(["block", "projector", "embed", "ln_final", "unembed"])]
    vision = energy.loc[energy["part"] == "vision", "squares"].sum()
    total = whole.loc[whole["section"] != "vision", "squares"].sum() + vision
    assert total == pytest.approx((table["fro_norm"] ** 2).sum(), rel=1e-5)


def test_ranges_neurons_and_what_names_nothing(table, weights) -> None:
    asked = ["blocks.3-5.mlp", "blocks.2.mlp.neuron.7"]
    found = by_address(table, *FOLDERS, addresses=asked, progress=False).set_index(["stage", "address"])
    some = table[(table["stage"] == "rl") & table["address"].isin([f"blocks.{i}.mlp" for i in (3, 4, 5)])]
    assert found.loc[("rl", asked[0]), "fro_norm"] == pytest.approx(np.linalg.norm(some["fro_norm"]))
    delta = {name: weights["rl"][name] - w for name, w in weights["in"].items()}
    mlp = "model.language_model.layers.2.mlp"
    parts = [delta[f"{mlp}.{one}_proj.weight"][7] for one in ("gate", "up")]
    parts.append(delta[f"{mlp}.down_proj.weight"][:, 7])
    assert found.loc[("rl", asked[1]), "fro_norm"] == pytest.approx(float(torch.cat(parts).norm()))
    for address, match in (
        ("blocks.9", "blocks 0-8"),
        ("blocks.0.attn.head.4", "heads 0-3"),
        ("unembed", "tied to the embedding"),
        ("block.3", "is not an address"),
    ):
        with pytest.raises(FrankenlensError, match=match):
            by_address(table, *FOLDERS, addresses=[address])
    with pytest.raises(FrankenlensError, match="the checkpoints that compare"):
        by_address(table, *FOLDERS[:2])


def test_trends_are_the_mean_of_the_matrices_at_four_ranks(table) -> None:
    long = with_regions(spectra(table), thirds(9))
    found = trends(long, ["region"]).set_index(["region", "stage", "rank"])
    some = table[(table["stage"] == "rl") & (table["section"] == "decoder") & table["columns"].notna()]
    some = some[some["layer_index"] >= 6]
    row = found.loc[("Late", "rl", 20)]
    assert row["log_ratio"] == pytest.approx(np.mean([one[19] for one in some["log_spectrum"]]))
    assert row["log_ratio"] < row["random"] and row["n"] == len(some) == 21
    assert np.isnan(row["low"])  # too few matrices for an interval
    assert np.isnan(found.loc[("projector", "rl", 20), "low"])
    whole = trends(long, ["section"]).set_index(["section", "stage", "rank"])
    for stage in ("in", "rl"):
        decoder = table[
            (table["stage"] == stage) & (table["section"] == "decoder") & table["columns"].notna()
        ]
        for rank in (10, 20):
            row = whole.loc[("decoder", stage, rank)]
            values = np.array([one[rank - 1] for one in decoder["log_spectrum"]])
            assert row["n"] == len(values) == 63
            np.testing.assert_allclose(row[["log_ratio", "low", "high"]].to_list(), plain_interval(values))
            assert row["low"] < row["log_ratio"] < row["high"] < row["random"]


def test_figures_of_an_identical_pair_and_without_base_are_drawn(tmp_path) -> None:
    partition = thirds(9)
    for rl in FOLDERS[:2]:
        table = compare(FOLDERS[0], rl, subspace=None, progress=False)
        found = layers(table)
        figures = [plot_energy(found, partition), plot_directions(found, partition)]
        figures.append(plot_spectra(spectra(table), partition))
        for i, figure in enumerate(figures):
            figure.savefig(tmp_path / f"{i}.png", dpi=40)
            assert figure.axes
