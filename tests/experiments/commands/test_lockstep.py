"""`frankenlens lockstep` on the embedded pair, end to end."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import embedded
from experiments.cli import main
from experiments.commands import map as map_command
from experiments.commands.lockstep import COMMAND, LockstepConfig, _map
from experiments.commands.map import MapConfig
from experiments.settings import load_examples
from hooks.errors import FrankenlensError
from interp.lockstep import Moved, lockstep
from interp.map.summary import READ_OF_CELLS, summarise
from interp.pair.pair import Pair
from interp.questions.tasks import grade
from interp.results.files import load_dataset, provenance, save_dataset
from tests.interp.map.synthetic import synthetic_map

SMALL: dict[str, Any] = {"n": 32, "batch_size": 32, "max_new_tokens": 16, "n_random": 1}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lockstep")
    config = {**SMALL, "steer": "blocks.6.hook_resid_post", "coefficients": (2.0,), "top": (2,)}
    COMMAND.run(LockstepConfig(out=folder, **config))
    return folder


def test_tables_figures_dataset_and_page_are_written(out):
    assert sorted(path.name for path in out.iterdir()) == [
        "finished",
        "lockstep.csv",
        "lockstep.nc",
        "lockstep.png",
        "lockstep_traces.png",
        "report.html",
        "steering.csv",
        "steering.png",
    ]
    page = (out / "report.html").read_text(encoding="utf-8")
    for said in ("McNemar", "used to choose the components (16)", "16 questions", "beyond random components"):
        assert said in page


def test_components_are_chosen_on_one_half_and_tried_on_the_other(out):
    examples, _ = load_examples(LockstepConfig(**SMALL), 0)
    found = load_dataset(out / "lockstep.nc")
    assert found["example"].to_numpy().tolist() == [example.id for example in examples[1::2]]
    assert set(found["looked_at"].to_numpy().tolist()) == {example.id for example in examples}
    assert found["condition"].to_numpy().tolist() == ["top 2", "top 2, random 1"]
    assert found["size"].to_numpy().tolist() == [2, 2]
    made = json.loads(found.attrs["provenance"])
    assert set(made["checkpoints"]) == {"in", "rl"} and made["dropped"] == {
        "used to choose the components": 16
    }


def test_the_table_is_lockstep_run_again(out):
    examples, _ = load_examples(LockstepConfig(**SMALL), 0)
    table = pd.read_csv(out / "lockstep.csv")
    row = table.loc[
        (table["function"] == "all") & (table["draw"] == -1) & (table["direction"] == "rl_to_in")
    ].iloc[0]
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    prompts = [pair.builder.build(example) for example in examples[1::2]]
    written = lockstep(pair.rl, pair.in_, prompts, Moved(tuple(row["components"].split(", "))), 16)
    pair.close()
    assert row["accuracy"] == pytest.approx(np.mean([grade(w.answer, w.prompt.example) for w in written]))
    assert row["n"] == 16 and row["random"] == row["random"]
    doses = pd.read_csv(out / "steering.csv")
    assert set(doses["model"]) == {"IN", "RL"} and set(doses["group"]) == {"mean", "pc 1"}
    assert set(doses.loc[doses["model"] == "RL", "coefficient"]) == {-2.0}


def test_components_of_a_map_are_confirmed_on_questions_it_did_not_look_at(tmp_path):
    map_command.COMMAND.run(
        MapConfig(
            out=tmp_path / "map",
            n=16,
            points=("mlp_out",),
            batch_size=16,
            max_new_tokens=16,
            decision="first",
        )
    )
    config = {**SMALL, "map": tmp_path / "map" / "map.nc", "top": (1,), "n_random": 0}
    [found] = COMMAND.run(LockstepConfig(out=tmp_path / "out", **config))
    data = found.dataset
    assert data is not None and data.sizes["example"] == 16
    assert found.account.left_out == {"looked at when the map was made": 16}
    seen, _ = load_examples(MapConfig(n=16), 0)
    assert not {e.id for e in seen} & set(data["example"].to_numpy().tolist())
    with pytest.raises(FrankenlensError, match="all 16 questions were looked at"):
        COMMAND.run(LockstepConfig(out=tmp_path / "none", **{**config, "n": 16}))
    assert not list((tmp_path / "none").glob("*"))


@pytest.mark.parametrize("missing", [*READ_OF_CELLS, "point"])
def test_an_older_map_is_refused_by_what_it_lacks(tmp_path, missing):
    summary = summarise(synthetic_map(layers=3, heads=2, vision=1)).drop_vars(missing)
    save_dataset(summary, tmp_path / "map.nc", provenance({}, {}, {}, {}))
    with pytest.raises(
        FrankenlensError, match=rf"map.nc has no {missing} \[.*no result of `frankenlens map`"
    ):
        _map(tmp_path / "map.nc")


def test_a_map_that_does_not_say_whether_recoveries_are_refused_is_none(tmp_path):
    summary = summarise(synthetic_map(layers=3, heads=2, vision=1))
    save_dataset(summary, tmp_path / "map.nc", provenance({}, {}, {}, {}))
    assert set(_map(tmp_path / "map.nc").data_vars) == set(summary.data_vars)
    del summary.attrs["refused"]
    save_dataset(summary, tmp_path / "older.nc", provenance({}, {}, {}, {}))
    with pytest.raises(FrankenlensError, match="older.nc is no result of `frankenlens map`"):
        _map(tmp_path / "older.nc")


def test_mistakes_are_one_error_each(tmp_path, capsys):
    faults: list[tuple[dict[str, Any], str]] = [
        ({"components": ("blokcs.1",)}, "not an address"),
        ({"components": ("blocks.1",), "steer": "blocks.1.hook_resid_post"}, "--steer makes its directions"),
        ({"when": ("later",)}, "none of prefill"),
        ({"top": (0,)}, "sizes of at least 1"),
        ({"temperature": -1.0}, "temperature is above 0"),
        ({"steer": "blocks.1.hook_resid_post", "coefficients": (0.0,)}, "other than 0"),
        ({"map": tmp_path / "none.nc"}, "no such file"),
        ({"top_p": 0.9}, "--top-p 0.9 needs a --temperature above 0"),
        ({"coefficients": (1.0,)}, "--coefficients 1.0 needs --steer"),
        ({"components": ("blocks.1",), "top": (2,)}, "--top 2 needs a map: no --components"),
    ]
    for wrong, why in faults:
        with pytest.raises(FrankenlensError, match=why):
            COMMAND.prepare(LockstepConfig(**wrong))
    arguments = [
        "--components",
        "blocks.77.mlp",
        "--n",
        "4",
        "--n-random",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["lockstep", *arguments]) == 2
    assert "blocks.77.mlp: the model has blocks 0-8 there" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))
