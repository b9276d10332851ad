"""`frankenlens localize` on the embedded triple, on the paper's folders, and on a file of questions."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import embedded
from experiments.cli import main
from experiments.commands.localize import COMMAND, LocalizeConfig, load
from hooks.errors import FrankenlensError
from interp.localization import Swap, outcome_shares, vision_swap
from interp.pair.pair import Pair
from interp.questions.tasks import TASKS, counterfactual_pairs, neutral_pairs, sample, split_of
from interp.results.files import load_dataset

SMALL = {"n": 8, "functions": ("count", "colour_at"), "max_new_tokens": 12}
FILES = [
    "finished", "localize.nc", "localize_ablation.csv", "localize_ablation.png", "localize_heads.png",
    "localize_swap.csv", "localize_swap.png", "report.html",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("localize")
    COMMAND.run(LocalizeConfig(out=folder, kinds=("skip",), parts=("attn", "head"), tasks=("sum",), **SMALL))
    return folder


def test_all_files_are_written_and_nothing_else(out) -> None:
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_the_swap_table_holds_modes_controls_and_the_layers_shares(out) -> None:
    table = pd.read_csv(out / "localize_swap.csv")
    assert set(table["mode"]) == {"single", "suffix"}
    assert set(table["pairs"]) == {"counterfactual", "same answer", "itself"}
    assert set(table["function"]) == {"counting", "colour at a place", "all"}
    itself = table.query("pairs == 'itself' and outcome == 'changed' and function != 'all'")
    assert (itself["value"] == 0).all() and set(itself["n"]) == {8}
    whole = table.query(
        "mode == 'suffix' and first == 0 and pairs == 'counterfactual' and outcome == 'source'"
    )
    assert (whole["value"] == 1).all() and (whole["n"] > 4).all()
    rates = table.query("mode == 'suffix' and pairs == 'counterfactual' and function == 'counting'")
    changed = rates.query("outcome == 'changed'").sort_values("first")["value"].to_numpy()
    parts = rates.query("outcome == 'CR(k) − CR(k+1)'").sort_values("first")["value"].to_numpy()
    np.testing.assert_allclose(parts, changed - np.append(changed[1:], 0))


def test_the_tables_are_those_of_the_analyses_run_by_hand(out) -> None:
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"), embedded.path("base"))
    pairs = counterfactual_pairs("count", SMALL["n"], 0)
    found = vision_swap(
        pair.models["base"], pair.builder, pairs, [Swap(0, 0)], max_new_tokens=24, progress=False
    )
    expected = outcome_shares(found).set_index("outcome")["value"]
    table = pd.read_csv(out / "localize_swap.csv").query(
        "mode == 'single' and first == 0 and pairs == 'counterfactual' and function == 'counting'"
    )
    for row in table.to_dict("records"):
        assert row["value"] == pytest.approx(expected[row["outcome"]])
    dataset = load_dataset(out / "localize.nc")
    sources = {source.id for _, source in pairs}
    assert sources <= set(dataset["looked_at"].to_numpy().tolist())  # the dataset's own ids are the targets'
    assert not sources & set(dataset["example"].to_numpy().tolist())
    assert dataset.sizes["example"] == 16 and dataset.sizes["question"] == 24
    ablation = pd.read_csv(out / "localize_ablation.csv")
    assert set(ablation["function"]) == {"counting", "colour at a place", "sum", "all"}
    assert set(ablation["part"]) == {"attn", "head"}
    sums = dataset["clean_right"].to_numpy()[16:]
    assert ablation.query("function == 'sum'")["whole"].unique() == pytest.approx(np.nanmean(sums))


def test_the_page_says_what_was_done_and_what_was_left_out(out) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    for text in (
        "BASE, greedy",
        "same answer",
        "swapped with itself changes a share of 0 ",
        "Holm",
        "n = 8",
    ):
        assert text in page


def test_neutral_pairs_share_the_targets_and_keep_the_answer() -> None:
    for task in TASKS:
        targets = {target.id: target for target, _ in counterfactual_pairs(task, 12, seed=4)}
        pairs = neutral_pairs(task, 12, seed=4)
        assert len(pairs) >= 9
        for target, source in pairs:
            assert targets[target.id] == target or targets[target.id].meta["scene"] == target.meta["scene"]
            assert target.question == source.question and target.answer == source.answer
            a, b = (example.meta["scene"] for example in (target, source))
            assert sum(x != y for x, y in zip(a.layout, b.layout, strict=True)) == 1
            assert split_of(b.layout) == "map" and a.style == b.style
            assert source.answer == TASKS[task].solve(source.meta["arguments"], b).answer


@pytest.fixture
def folder(tmp_path):
    """A folder in the paper's form, of the synthetic counting pairs; one image is missing."""
    place = tmp_path / "data" / "counting"
    (place / "images").mkdir(parents=True)
    rows = []
    for i, (target, source) in enumerate(counterfactual_pairs("count", 9, seed=2)):
        for side, example in (("t", target), ("s", source)):
            if i != 4 or side == "s":
                example.images[0].save(place / "images" / f"{i}_{side}.png")
        meta = {"target_answer": target.answer, "source_answer": source.answer}
        row = {"id": f"c{i}", "task": "counting", "prompt": f"<image>{target.question}", "meta": meta}
        rows.append(row | {"target_image": f"images/{i}_t.png", "source_image": f"images/{i}_s.png"})
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def test_the_papers_folders_and_its_definition(folder, tmp_path) -> None:
    config = LocalizeConfig(
        data=folder, functions=("counting",), paper=True, model="rl", out=tmp_path / "out"
    )
    [section] = COMMAND.run(config)
    table = section.tables["localize_swap"]
    assert set(table["mode"]) == {"suffix"} and set(table["pairs"]) == {"counterfactual", "itself"}
    first = table.query("first == 0 and pairs == 'counterfactual' and outcome == 'changed'").iloc[0]
    assert first["n"] == 8 and first["left_out"] == 0
    assert set(section.tables["localize_ablation"]["ablation"]) == {f"skip blocks.{i}" for i in range(9)}
    assert any("does not exist" in reason for reason in section.account.left_out)
    assert "the paper: RL" in section.account.definition and "all pairs" in section.account.definition
    assert "the paper's text" in section.account.definition
    # the model answers `<think> ... </think> answer 3`: the whole reply is graded, by its number
    assert section.dataset is not None
    assert all("answer" in text for text in section.dataset["clean"].to_numpy().ravel().tolist())


def test_a_file_of_questions_has_nothing_to_swap(tmp_path) -> None:
    rows = []
    for example in sample("count", 8, 1, "map"):
        example.images[0].save(tmp_path / f"{example.id}.png")
        rows.append({"question": example.question, "answer": example.answer, "image": f"{example.id}.png"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = LocalizeConfig(
        data=tmp_path / "data.jsonl",
        parts=("block",),
        kinds=("skip",),
        max_new_tokens=24,
        out=tmp_path / "out",
    )
    [section] = COMMAND.run(config)
    assert set(section.tables) == {"localize_ablation"}
    assert set(section.tables["localize_ablation"]["n"]) == {8}


def test_the_paper_is_spelt_out() -> None:
    config = LocalizeConfig(paper=True)
    assert (config.n, config.modes, config.kinds, config.parts) == (100, ("suffix",), ("skip",), ("block",))
    assert load(LocalizeConfig(n=2)).controls.keys() == {"same answer", "itself"}
    assert len(load(LocalizeConfig(n=3)).pairs) == 12


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"modes": ("windows",)}, "window:3"),
        ({"modes": ("window:0",)}, "window:3"),
        ({"modes": (), "parts": ()}, "nothing to do"),
        ({"parts": ()}, "go together"),
        ({"parts": ("block",), "kinds": ("mean",)}, "only be skipped"),
        ({"functions": ("ocr",)}, "choose of count"),
        ({"tasks": ("sums",)}, "Did you mean 'sum'|sum"),
        ({"n": 0}, "at least 1"),
        ({"paper": True, "modes": ("single",)}, "which has --modes suffix, not --modes single"),
        ({"paper": True, "n": 32}, "which has --n 100, not --n 32"),
        ({"modes": (), "what": "resid"}, "--what resid needs something to swap"),
        ({"parts": (), "kinds": (), "tasks": ("sum",)}, "--tasks sum needs --parts"),
        ({"data": Path(__file__), "modes": ("single",)}, "--modes single needs pairs of images"),
        ({"data": Path(__file__).parent, "images": Path("x")}, "a folder of pairs has its own"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(wrong, why) -> None:
    with pytest.raises(FrankenlensError, match=why):
        COMMAND.prepare(LocalizeConfig(**wrong))


def test_a_window_wider_than_the_model_is_one_line(tmp_path, capsys) -> None:
    assert main(["localize", "--modes", "window:99", "--n", "2", "--out", str(tmp_path)]) == 2
    assert "the decoder has 9 layers" in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
