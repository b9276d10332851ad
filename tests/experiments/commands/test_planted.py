"""`frankenlens planted`: its files, what it keeps, and plants that training made."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import embedded
from experiments.commands import planted_pairs
from experiments.commands.planted import COMMAND, PlantedConfig
from experiments.retraining import plants
from experiments.triple.rl import RL
from experiments.triple.supervised import Schedule
from hooks import FrankenlensError, HookedVLM, weight_slices
from interp.pair.pair import Pair
from interp.planting import KINDS, Draws
from interp.planting.table import auroc
from interp.results.store import Store

METHODS = ("patch RL → IN", "graft RL → IN", "compare")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PlantedConfig:
    out = tmp_path_factory.mktemp("planted")
    kinds = ("rl", "decoys", "identical", "noise")
    return PlantedConfig(
        kinds=kinds,
        methods=METHODS,
        out=out,
        components=("projector", "blocks.3.mlp"),
        n=16,
        pairs=1,
        others=1,
        nulls=1,
        noise_pairs=3,
        max_new_tokens=16,
        batch_size=16,
    )


@pytest.fixture(scope="module")
def section(config):
    [section] = COMMAND.run(config)
    return section


def test_all_files_are_written(section, config) -> None:
    names = {path.name for path in config.out.iterdir()}
    tables = {"planted.csv", "planted_null.csv", "planted_pairs.csv", "plants.csv", "scores.csv"}
    assert names == {*tables, "planted.png", "report.html", "finished"}
    found = pd.read_csv(config.out / "planted.csv")
    assert found.groupby("kind")["n_pairs"].first().to_dict() == {"rl": 1, "decoys": 1, "named": 1}
    assert set(pd.read_csv(config.out / "planted_null.csv")["kind"]) == {"identical", "noise"}
    assert "3 noise pairs" in found["definition"][0]
    assert "p < 0.05 of a sign flip test over prompts, which tests symmetry about 0" in found["definition"][0]
    pairs = pd.read_csv(config.out / "planted_pairs.csv")
    plants = pd.read_csv(config.out / "plants.csv", keep_default_na=False)
    assert len(plants) == 3 + 3 + 3 + 2  # noise pairs, and every changed component of every pair
    limit = plants.loc[plants["component"] == "", "effect"].quantile(0.95)
    seen = plants.loc[(plants["component"] != "") & (plants["effect"] > limit)].groupby("pair").size()
    for _, row in pairs.iterrows():
        assert row["n_visible"] == seen.get(row["pair"], 0) <= row["n_changed"]


def test_the_table_is_a_recount_of_the_scores(section, config) -> None:
    scores = pd.read_csv(config.out / "scores.csv")
    found = pd.read_csv(config.out / "planted.csv").set_index(["kind", "method"])
    for method in METHODS:
        own = scores.loc[(scores["kind"] == "rl") & (scores["method"] == method)]
        each = [auroc(one["score"].to_numpy(), one["changed"].to_numpy()) for _, one in own.groupby("pair")]
        assert found.loc[("rl", method), "auroc"] == pytest.approx(np.mean(each))
        assert own.groupby("pair")["changed"].sum().tolist() == [3]
    decoys = scores.loc[(scores["kind"] == "decoys") & (scores["method"] == "compare")]
    assert decoys.nlargest(3, "score")["changed"].sum() == 0  # permuted neurons weigh more than any plant
    assert found.loc[("decoys", "graft RL → IN"), "auroc"] > found.loc[("decoys", "compare"), "auroc"] - 0.1


def test_changes_are_claimed_and_null_pairs_are_not(section, config) -> None:
    """A large change among the components that are named; nothing where nothing changed."""
    pairs = pd.read_csv(config.out / "planted_pairs.csv").set_index(["kind", "method"])
    named = pairs.loc[("named", "graft RL → IN")]
    assert named["tested"] and not named["refused"] and named["found"] >= 1 and named["n_changed"] == 2
    for kind in ("identical", "noise"):
        row = pairs.loc[(kind, "patch RL → IN")]
        assert row["tested"] and row["refused"] and row["claims_kept"] == 0
    assert pairs.loc[("identical", "patch RL → IN"), "claims"] == 0
    assert not pairs.loc["rl"].loc["compare", "tested"].any()


def test_finished_pairs_are_not_made_again(section, config, monkeypatch) -> None:
    before = (config.out / "scores.csv").read_text()

    def never(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(planted_pairs, "trial", never)
    monkeypatch.setattr(planted_pairs, "effect_of_plant", never)
    COMMAND.run(config)
    assert (config.out / "scores.csv").read_text() == before
    with pytest.raises(AssertionError, match="made again"):  # one pair more is
        COMMAND.run(dataclasses.replace(config, pairs=2))
    with pytest.raises(AssertionError, match="made again"):  # other settings are another experiment
        COMMAND.run(dataclasses.replace(config, n=5))
    monkeypatch.setattr(plants, "SUPERVISED", Schedule(1, batch=2, lr=1e-3))
    with pytest.raises(AssertionError, match="made again"):  # so is other training
        COMMAND.run(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kinds": ("rl", "nois")}, "Did you mean 'noise'"),
        ({"methods": ("patch",)}, "there is no method 'patch'"),
        ({"pairs": 0}, "--pairs is 0; give 1 to 999"),
        ({"others": 1000}, "--others is 1000"),
        ({"kinds": ("named",)}, "needs --components"),
        ({"in_": "x"}, "--in and --rl go together"),
        ({"kinds": ("supervised",), "in_": "x", "rl": "y"}, "only such a model can be trained"),
        ({"changed": 45}, "only 45 components that RL moved"),
        ({"change": "rotated"}, "--change rotated needs --components"),
        ({"kinds": ("layer",), "pairs": 10}, "--pairs 10 needs rl among --kinds"),
        ({"kinds": ("rl",), "nulls": 8}, "--nulls 8 needs a null kind"),
        ({"kinds": ("layer",), "changed": 3}, "--changed 3 needs one of rl, random"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words, tmp_path) -> None:
    with pytest.raises(FrankenlensError, match=words):
        COMMAND.run(PlantedConfig(**{"noise_pairs": 1, "n": 1, "out": tmp_path / "x", **settings}))


@pytest.mark.parametrize("rl", [False, True])
def test_training_changes_the_named_components_and_nothing_else(rl, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plants, "SUPERVISED", Schedule(2, batch=2, lr=1e-3, warmup=1))
    monkeypatch.setattr(plants, "REINFORCED", RL(steps=2, prompts=2, samples=4, lr=1e-3, save_every=2))
    components = ("blocks.3.mlp", "blocks.5.attn.head.1")
    folder = tmp_path / "plant"
    trained = plants.train_components(embedded.path("in"), components, rl, 0, folder)
    own = HookedVLM.from_pretrained(embedded.path("in"), check=False)
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in own.model.named_parameters()}
    for component in components:
        for piece in weight_slices(own.model, own.anatomy, component):
            piece.of(masks[piece.parameter]).fill_(True)
    before = dict(own.model.named_parameters())
    moved = 0
    for name, after in trained.model.named_parameters():
        assert torch.equal(after[~masks[name]], before[name][~masks[name]])
        moved += int((after[masks[name]] != before[name][masks[name]]).sum())
    assert moved > 0.5 * sum(int(mask.sum()) for mask in masks.values())
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_every_kind_has_a_plant_and_seeds_do_not_meet(config) -> None:
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    draws = Draws(pair.in_, pair.rl, named=config.components)
    with pytest.raises(FrankenlensError, match="has no experts"):
        draws.plant("experts", 0)
    made = {kind: [draws.plant(kind, i) for i in range(3)] for kind in KINDS if kind != "experts"}
    seeds = [plant.seed for some in made.values() for plant in some]
    assert len(set(seeds)) == len(seeds)
    assert [plant.components for plant in made["region"]] == [
        ("blocks.0-2",),
        ("blocks.3-5",),
        ("blocks.6-8",),
    ]
    assert {plant.components[0][:14] for plant in made["vision"]} == {"vision.blocks."}
    assert [plant.components for plant in made["projector"]] == [("projector",)] * 3
    assert made["named"][0].components == config.components
    for plant in made["decoys"]:
        assert len(plant.decoys) == 3 and not set(plant.decoys) & set(plant.components)
    pair.close()


def test_cells_of_null_pairs_are_read_as_such(tmp_path: Path) -> None:
    """Their sort is written "null", which pandas takes for a missing value."""
    row = {"where": "null", "effect": 0.5, "floor": np.nan, "beyond": False, "refused": ""}
    rows = pd.DataFrame([row, {**row, "where": "before", "refused": "too small"}])
    keep = Store(tmp_path, {})
    keep.part("marks", lambda: rows)
    found = keep.part("marks", lambda: pytest.fail("made again"))
    pd.testing.assert_frame_equal(found, rows)
    assert found["where"].tolist() == ["null", "before"] and found["floor"].isna().all()
