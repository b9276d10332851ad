"""`frankenlens metrics` on the embedded triple: its table is what the definitions give when counted by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.cli import main
from experiments.commands.metrics import COMMAND, SYNTHETIC, MetricsConfig, load
from experiments.settings import load_pair
from interp.fine_grained import change_table
from interp.pair.generation import greedy
from interp.prompts import PromptBuilder
from interp.results.files import load_dataset

SMALL: dict[str, Any] = {"n": 8, "batch_size": 16, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    COMMAND.run(MetricsConfig(out=folder, **SMALL))
    return folder


def test_files(out):
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "finished",
        "metrics.csv",
        "metrics.nc",
        "metrics.png",
        "metrics_change.csv",
        "report.html",
    ]
    assert "Holm over the metrics" in (out / "report.html").read_text(encoding="utf-8")


def test_rl_with_the_image_is_what_its_own_generation_says(out):
    config = MetricsConfig(**SMALL)
    asked = load(config)
    examples = asked.examples
    assert not asked.left_out and len(examples) == 16  # with an image, and the description in its place
    assert examples[8].question == SYNTHETIC.format(
        description=examples[0].meta["description"], question=examples[0].question
    )
    pair = load_pair(config)
    builder: PromptBuilder = pair.builder
    prompts = [builder.build(example) for example in examples[:8]]
    written = zip(prompts, greedy(pair.rl, prompts, 40), strict=True)
    said = [builder.read_trace(prompt.with_tokens(ids)).answer for prompt, ids in written]
    right = [answer == example.answer for answer, example in zip(said, examples, strict=False)]
    table = pd.read_csv(out / "metrics.csv")
    row = table[(table.model == "rl") & (table.measure == "accuracy, image") & (table.task == "all")]
    assert row["value"].item() == pytest.approx(np.mean(right))
    assert row["n"].item() == 8


def test_the_change_is_the_difference_of_the_two_columns(out):
    found = load_dataset(out / "metrics.nc")
    assert found.sizes["looked_at"] == 16  # with an image, and in words
    table = change_table(found).set_index("measure")
    for metric in ("vis", "v2r", "rea"):
        in_, rl = (found["value"].sel(model=m, metric=metric).to_numpy() for m in ("in", "rl"))
        assert table.loc[metric, "change"] == pytest.approx(np.nanmean(rl - in_))
        assert table.loc[metric, "gained"] - table.loc[metric, "lost"] == np.nansum(rl - in_)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--paper", "--n", "100", "--data", "x"], "--paper has its own data"),
        (["--paper", "--n", "99"], "which has --n 100, not --n 99: leave out --n, or --paper"),
        (["--paper", "--describe", "data"], "which has --describe model, not --describe data"),
        (["--metrics", "vis", "--describe", "data"], "--describe data needs v2r among --metrics"),
        (["--metrics", "seen"], "--metrics has 'seen'"),
    ],
)
def test_a_mistake_is_one_line(argv, words, tmp_path, capsys):
    assert main(["metrics", *argv, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words in said[0]
    assert not (tmp_path / "out").exists()
