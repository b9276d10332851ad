"""`--paper` is the paper: its prompts, limits, sample and data; what cannot be had is one line, and not replaced."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from experiments import embedded
from experiments.cli import main
from experiments.commands import localize, suite, transfer
from experiments.commands.compare import CompareConfig
from experiments.commands.freeze import FreezeConfig
from experiments.commands.localize import LocalizeConfig
from experiments.commands.metrics import MetricsConfig
from experiments.commands.suite import SuiteConfig
from experiments.commands.transfer import TransferConfig
from experiments.papers import paper_questions
from interp.comparison import compare, layers
from interp.fine_grained.paper import BOXED, INSTRUCTION, SYSTEM
from interp.questions.tasks import sample

PUBLIC = Path("gsm8k")


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    """The three data sets with their true columns, of synthetic scenes."""
    folder = tmp_path_factory.mktemp("copies")
    rows = []
    for category, seed in (("general-vqa", 1), ("math-targeted-vqa", 2)):
        for i, one in enumerate(sample("count", 6, seed, "map")):
            rows.append(
                {
                    "pid": f"{category}-{i}", "question": one.question, "query": f"Hint: a number. {one.question}",
                    "decoded_image": one.images[0], "answer": one.answer, "question_type": "free_form",
                    "answer_type": "integer", "choices": None, "precision": None, "unit": None,
                    "metadata": {"category": category, "task": "t", "source": "s"},
                }
            )  # fmt: skip
    features = datasets.Dataset.from_list(rows[:1]).features | {
        "choices": datasets.List(datasets.Value("string")),
        "precision": datasets.Value("float64"),
        "unit": datasets.Value("string"),
        "decoded_image": datasets.Image(),
    }
    whole = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    datasets.DatasetDict({"testmini": whole}).save_to_disk(str(folder / "mathvista"))
    problems = [
        {
            "problem": f"how many {i} ?",
            "answer": str(i),
            "unique_id": str(i),
            "solution": "",
            "subject": "",
            "level": 1,
        }
        for i in range(5)
    ]
    pd.DataFrame(problems).to_parquet(folder / "math-500.parquet")
    words = [{"question": "how many red square ?", "answer": f"count\n#### {i}"} for i in range(4)]
    pd.DataFrame(words).to_parquet(folder / "gsm8k.parquet")
    return folder


def test_prompts_limits_and_sample_are_the_papers() -> None:
    for config in (MetricsConfig(paper=True), TransferConfig(paper=True)):
        assert (config.seed, config.max_new_tokens, config.n) == (123, 8192, 100)
        assert (config.instruction, config.system) == (INSTRUCTION, SYSTEM["reasoner"])
        assert config.answer == BOXED
    skipped = LocalizeConfig(paper=True, data=PUBLIC)
    assert (skipped.max_new_tokens, skipped.instruction) == (2048, INSTRUCTION)
    assert skipped.system is None  # Base has none
    assert LocalizeConfig(paper=True, data=PUBLIC, model="rl").system == SYSTEM["reasoner"]
    swapped = LocalizeConfig(paper=True, data=Path(__file__).parent)
    assert (swapped.max_new_tokens, swapped.instruction, swapped.change) == (64, "", "text")
    assert LocalizeConfig(paper=True, change="code").change == "code"
    assert CompareConfig(paper=True).energy == "relative"
    frozen = FreezeConfig(paper=True)
    assert (frozen.steps, frozen.samples, frozen.n, frozen.max_new_tokens) == (2000, 4, 100, 8192)
    ours = MetricsConfig()
    assert (ours.seed, ours.max_new_tokens, ours.instruction, ours.system, ours.answer) == (
        0,
        128,
        "",
        None,
        ("answer",),
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["transfer", "--paper", "--seed", "1"], "which has --seed 123, not --seed 1"),
        (["transfer", "--paper", "--max-new-tokens", "128"], "which has --max-new-tokens 8192"),
        (["transfer", "--paper", "--system", "Be brief."], "not --system Be brief."),
        (["transfer", "--paper", "--instruction", "Think."], "not --instruction Think."),
        (["transfer", "--paper", "--answer", "answer"], "not --answer answer"),
        (["transfer", "--paper", "--data", "x.jsonl"], "--paper has its own data"),
        (
            ["metrics", "--paper", "--described", "{description} {question}"],
            "leave out --described, or --paper",
        ),
        (["compare", "--paper", "--energy", "update"], "which has --energy relative, not --energy update"),
        (["compare", "--paper", "--partition", "code"], "which has --partition paper"),
        (["localize", "--paper", "--data", "gsm8k", "--split", "explore"], "which has --split all"),
        (
            ["localize", "--paper", "--data", "gsm8k", "--max-new-tokens", "64"],
            "which has --max-new-tokens 2048",
        ),
        (["localize", "--change", "words"], "words"),
        (["localize", "--paper"], "nothing stands in for them: give --data"),
        (["freeze", "--paper"], "nothing stands in for it: give --train"),
        (["localize", "--data", "gsm9k"], "no such file or folder: gsm9k"),
        (["metrics", "--copies", "."], "--copies holds public data sets"),
    ],
)
def test_what_contradicts_the_paper_or_cannot_be_had_is_one_line(argv, words, tmp_path, capsys) -> None:
    try:
        code = main([*argv, "--out", str(tmp_path / "out")])
    except SystemExit as error:  # of tyro, for a word that is no choice
        code = error.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and words in said and not (tmp_path / "out").exists()
    if "--change" not in argv:
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("command", ["metrics", "transfer"])
def test_data_that_is_not_here_is_named_and_not_filled_in(command, tmp_path, capsys) -> None:
    (tmp_path / "copies").mkdir()
    argv = [command, "--paper", "--copies", str(tmp_path / "copies"), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "holds no mathvista" in said[0]


def test_the_suite_leaves_out_by_name_what_cannot_be_had(tmp_path) -> None:
    (tmp_path / "copies").mkdir()
    prepared = suite.load(SuiteConfig(paper=True, copies=tmp_path / "copies", out=tmp_path / "out"))
    assert set(prepared.parts) == {"attention", "compare"}
    reasons = list(prepared.left_out)
    assert sum("holds no mathvista" in reason for reason in reasons) == 2
    assert sum("nothing stands in for them" in reason for reason in reasons) == 1


def test_a_part_of_the_suite_has_the_papers_settings_or_those_that_were_given() -> None:
    part = suite.settings_of(SuiteConfig(paper=True), "transfer")
    assert (part.seed, part.max_new_tokens, part.instruction) == (123, 8192, INSTRUCTION)
    own = suite.settings_of(SuiteConfig(seed=7, max_new_tokens=9), "metrics")
    assert (own.seed, own.max_new_tokens, own.instruction) == (7, 9, "")


def test_the_papers_questions_come_from_its_data_drawn_as_it_does(copies) -> None:
    asked = paper_questions(TransferConfig(paper=True, copies=copies), 123, ("vis", "v2r", "rea"))
    names = [(one.task, one.id.rpartition("-")[2]) for one in asked.examples]
    assert names == [(task, str(i)) for task, n in (("vis", 6), ("v2r", 6), ("rea", 5)) for i in range(n)]
    assert all("Hint" not in one.question for one in asked.examples)  # the bare question
    assert {bool(one.images) for one in asked.examples if one.task == "rea"} == {False}


def _smaller(config: Any, **changes: Any) -> Any:
    """Settings that the embedded models, which know 60 words, can follow."""
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    return config


def test_table_2_is_the_papers_metrics_on_its_data(copies, tmp_path, monkeypatch) -> None:
    def described(pair, examples, **running):
        return [
            type(one)(one.id, one.images, one.question, one.answer, one.task, None, {**one.meta, "description": "red"})
            if one.task == "v2r" else one
            for one in examples
        ]  # fmt: skip

    monkeypatch.setattr(transfer, "described", described)
    monkeypatch.setattr(transfer, "DESCRIBED", "{description} , {question}")
    config = TransferConfig(paper=True, copies=copies, controls=(), unparsed=1.0, out=tmp_path / "out")
    small = {"max_new_tokens": 24, "instruction": "", "system": None, "answer": ("answer",)}
    _smaller(config, **small, variants=(), scales=(1.0,))
    [section] = transfer.COMMAND.run(config)
    wide = section.tables["table_2"]
    assert wide["metric"].tolist()[:3] == ["M_vis", "M_v2r", "M_rea"]
    table = section.tables["transfer"]
    for metric, n in (("M_vis", 6), ("M_v2r", 6), ("M_rea", 5)):
        own = table.loc[(table["metric"] == metric) & (table["variant"] == "RL")].iloc[0]
        assert own["n"] == n and own["accuracy"] >= own["value"] - 1e-12  # an answer that counts is right
    assert "M_vis: right with the image" in section.account.definition
    assert "GPT-4o-mini" in section.account.definition  # what cannot be had is said


@pytest.mark.parametrize("name", ["gsm8k", "math-500"])
def test_localize_takes_the_data_of_fig_4b(name, copies, tmp_path) -> None:
    config = LocalizeConfig(
        data=Path(name), copies=copies, n=2, parts=("block",), kinds=("skip",), unparsed=1.0, max_new_tokens=6,
        out=tmp_path / "out",
    )  # fmt: skip
    [section] = localize.COMMAND.run(config)
    table = section.tables["localize_ablation"]
    assert set(table["function"]) == {name} and table["layer"].tolist() == list(range(9))
    assert "localize_swap" not in section.tables


def test_energy_is_the_mean_relative_norm_of_matrices() -> None:
    """Against NumPy on the files; the projector's `ln_q` is in the released code's mean alone."""
    stages = [embedded.path(name) for name in ("in", "rl")]
    before, after = ({k: v for f in s.glob("*.safetensors") for k, v in load_file(f).items()} for s in stages)
    found = layers(compare(*stages, spectra=False, subspace=None, progress=False)).set_index("layer")
    size = {
        name: np.linalg.norm((after[name] - before[name]).astype(float))
        / np.linalg.norm(before[name].astype(float))
        for name in before
    }
    own = [name for name in size if ".layers.4." in name and before[name].ndim > 1]
    assert found.loc["blocks.4", "mean_relative_norm"] == pytest.approx(
        np.mean([size[n] for n in own]), rel=1e-5
    )
    projector = [name for name in size if "merger" in name and name.endswith("weight")]
    matrices = [name for name in projector if before[name].ndim > 1]
    assert len(projector) == len(matrices) + 1 and "ln_q" in (set(projector) - set(matrices)).pop()
    row = found.loc["projector"]
    assert row["mean_relative_norm"] == pytest.approx(np.mean([size[n] for n in matrices]), rel=1e-5)
    assert row["released_relative_norm"] == pytest.approx(np.mean([size[n] for n in projector]), rel=1e-5)
    assert (
        abs(row["released_relative_norm"] - row["mean_relative_norm"])
        > 100 * 1e-5 * row["mean_relative_norm"]
    )
    assert np.isnan(found.loc["embed", "released_relative_norm"])  # of no layer
