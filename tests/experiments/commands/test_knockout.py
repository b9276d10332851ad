"""`frankenlens knockout` on the embedded pair, end to end."""

from typing import Any

import pandas as pd
import pytest

from experiments.cli import main
from experiments.commands.knockout import COMMAND, KnockoutConfig, _chosen, parse_route
from hooks.errors import FrankenlensError
from interp.knockout import PAPER_ROUTES
from interp.questions.tasks import REASONING
from interp.results.files import load_dataset

SMALL: dict[str, Any] = {"n": 12, "batch_size": 12, "max_new_tokens": 48, "width": 5}
CHOSEN = ("image -> question", "reasoning -> last")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knockout")
    COMMAND.run(KnockoutConfig(out=folder, routes=CHOSEN, **SMALL))
    return folder


def test_tables_figures_dataset_and_page_are_written(out):
    assert sorted(path.name for path in out.iterdir()) == [
        "knockout.csv",
        "knockout.nc",
        "knockout_flow.png",
        "knockout_nulls.csv",
        "knockout_routes.png",
        "report.html",
    ]
    assert (out / "knockout_flow.png").read_bytes()[:4] == b"\x89PNG"


def test_table_dataset_and_page_agree(out):
    table, found = pd.read_csv(out / "knockout.csv"), load_dataset(out / "knockout.nc")
    assert len(table) == 2 * 5 and set(table["route"]) == set(CHOSEN)
    one = table.loc[(table["route"] == CHOSEN[1]) & (table["window"] == "1-5")].iloc[0]
    here = found.sel(route=CHOSEN[1], window="1-5", model="rl")
    assert one["after"] == pytest.approx(float((here["value"] - here["clean"]).mean()))
    assert one["n"] == int((found["why"] == "").sum())
    assert one["after"] < -0.5 < one["after_control"]
    nulls = pd.read_csv(out / "knockout_nulls.csv")
    assert set(nulls["null"]) == {"bf16", "random"}
    page = (out / "report.html").read_text(encoding="utf-8")
    for said in ("Holm over 10 cuts", "windows of 5 layers", "random edges", "the same in both models"):
        assert said in page


def test_paper_is_spelt_out():
    config = KnockoutConfig(paper=True)
    assert (config.n, config.layers, config.width) == (100 * len(REASONING), "around", 9)
    assert config.routes == PAPER_ROUTES and config.relative and config.right_only
    assert KnockoutConfig().width == 3 and not KnockoutConfig().relative


def test_right_answers_alone_relative_and_without_nulls(tmp_path):
    own: dict[str, Any] = {"right_only": True, "relative": True, "nulls": False, "layers": "around", "n": 16}
    [section] = COMMAND.run(KnockoutConfig(out=tmp_path, routes=("question -> last",), **SMALL | own))
    table = section.tables["knockout"]
    assert table.attrs["units"] == "% of the clean value" and table["before"].min() > -100
    assert not (tmp_path / "knockout_nulls.csv").exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the answer is wrong" in page
    found = load_dataset(tmp_path / "knockout.nc")
    assert set(table["n"]) == {int((found["why"] == "").sum())}
    assert found.sizes["looked_at"] == 16 > found.sizes["example"]


def test_mistakes_are_one_error_each(tmp_path, capsys):
    small = ["--n", "4", "--out", str(tmp_path / "out")]
    assert main(["knockout", "--width", "12", *small]) == 2
    assert "the tower has 9; give 1 to 9" in capsys.readouterr().err
    assert main(["knockout", "--max-new-tokens", "2", "--unparsed", "1", *small]) == 2
    assert "None of 4 traces of RL can be used (4: the trace does not parse" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))
    faults: list[tuple[dict[str, Any], str]] = [
        ({"routes": ()}, "--routes is empty"),
        ({"routes": ("image",)}, 'write "source -> target"'),
        ({"routes": ("picture -> last",)}, "no role 'picture'"),
        ({"width": 0}, "--width is 0"),
        ({"relative": True, "metric": "trace"}, "--metric answer"),
        ({"layers": "suffixes", "width": 3}, "--width 3 needs --layers windows or around"),
        ({"paper": True, "n": 96}, "which has --n 400, not --n 96: leave out --n, or --paper"),
        ({"paper": True, "relative": False}, "which has --relative, not --no-relative"),
        ({"paper": True, "routes": ("image -> last",)}, "not --routes image -> last"),
    ]
    for wrong, why in faults:
        with pytest.raises(FrankenlensError, match=why):
            COMMAND.prepare(KnockoutConfig(**wrong))
    assert parse_route("image->last").edges == "image -> before answer"
    spelt = KnockoutConfig(routes=("image->last", "question ->reasoning"))  # plots read the name
    assert _chosen(False, spelt) == ["image -> last", "question -> reasoning"]
