"""`frankenlens transfer` on the embedded triple, end to end."""

import json
from importlib import import_module
from typing import Any

import pandas as pd
import pytest

from experiments.cli import main
from experiments.commands.transfer import COMMAND, TransferConfig
from hooks.errors import FrankenlensError
from interp.questions.tasks import PERCEPTION, REASONING
from interp.results.files import load_dataset

SMALL: dict[str, Any] = {
    "n": 16,
    "batch_size": 16,
    "max_new_tokens": 32,
    "variants": ("orders",),
    "scales": (),
    "ranks": (),
    "controls": ("layers",),
}
TASKS = (*PERCEPTION, *REASONING)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    COMMAND.run(TransferConfig(out=folder, addresses=("blocks.3.attn.head.1",), **SMALL))
    return folder


def test_table_figure_dataset_and_page_are_written(out):
    assert sorted(path.name for path in out.iterdir()) == [
        "finished",
        "report.html",
        "table_2.csv",
        "transfer.csv",
        "transfer.nc",
        "transfer.png",
    ]
    assert (out / "transfer.png").read_bytes()[:4] == b"\x89PNG"


def test_table_2_has_its_shape(out):
    table = pd.read_csv(out / "table_2.csv")
    columns = ["Base", "IN", "I:R:R", "I:I:R", "R:R:I", "R:I:I", "I:R:I", "R:I:R", "RL"]
    assert list(table)[2:11] == columns
    assert list(table["task"]) == [*TASKS, "perception, mean", "reasoning, mean", "all questions"]
    assert table["partition"].unique().tolist() == ["thirds (paper): Early 0-2, Mid 3-5, Late 6-8"]


def test_table_page_and_dataset_agree(out):
    table, found = pd.read_csv(out / "transfer.csv"), load_dataset(out / "transfer.nc")
    assert set(table["variant"]) == set(found["variant"].to_numpy().tolist())
    assert {"model", "order", "address", "control"} == set(table["kind"])
    one = table.loc[(table["variant"] == "I:R:R") & (table["task"] == "reasoning, mean")].iloc[0]
    chosen = found["right"].sel(variant="I:R:R").where(found["task"].isin(REASONING), drop=True)
    assert one["accuracy"] == pytest.approx(float(chosen.mean()))
    assert one["n"] == chosen.size == 8
    assert set(found["looked_at"].to_numpy()) == set(found["id"].to_numpy())
    made = json.loads(found.attrs["provenance"])
    assert set(made["checkpoints"]) == {"in", "rl", "base"}
    page = (out / "report.html").read_text(encoding="utf-8")
    for said in ("Holm over 7 variants", "2 questions a task", "thirds (paper)", "McNemar"):
        assert said in page


def test_paper_is_spelt_out():
    config = TransferConfig(paper=True)
    assert (config.n, config.rest, config.partition) == (100, "early", "paper")  # of each metric
    assert config.variants == ("orders",)
    assert config.scales == config.ranks == config.addresses == ()


def test_the_same_command_goes_on_where_it_was_killed(out, monkeypatch):
    """What each variant answered is kept; other questions begin anew."""
    before = (out / "transfer.csv").read_text()

    def never(*args, **kwargs):
        raise AssertionError("asked again")

    monkeypatch.setattr(import_module("interp.transfer.outcomes"), "greedy", never)
    COMMAND.run(TransferConfig(out=out, addresses=("blocks.3.attn.head.1",), **SMALL))
    assert (out / "transfer.csv").read_text() == before
    with pytest.raises(AssertionError, match="asked again"):
        COMMAND.run(TransferConfig(out=out, seed=1, **SMALL))


def test_mistakes_are_one_error_each(tmp_path, capsys):
    assert main(["transfer", "--partition", "3/3/2", "--out", str(tmp_path / "out")]) == 2
    assert "covers layers 0-7; the model has 9" in capsys.readouterr().err
    assert main(["transfer", "--addresses", "blocks.77", "--n", "8", "--out", str(tmp_path / "out")]) == 2
    assert "variant 'blocks.77'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.csv"))
    faults: list[tuple[dict[str, Any], str]] = [
        ({"addresses": ("blokcs.1",)}, "not an address"),
        ({"variants": (), "scales": (), "ranks": ()}, "nothing to graft"),
        ({"ranks": (0,)}, "rank="),
        ({"paper": True, "partition": "code"}, "which has --partition paper, not --partition code"),
        ({"paper": True, "scales": (0.5, 2.0)}, r"which has no --scales, not --scales 0.5 2.0"),
        ({"controls": (), "draws": 2}, "--draws 2 needs --controls"),
        ({"variants": ("factors",), "rest": "early"}, "--rest early needs orders among --variants"),
    ]
    for wrong, why in faults:
        with pytest.raises(FrankenlensError, match=why):
            COMMAND.prepare(TransferConfig(**wrong))
