"""`--traces`: commands on traces that were written elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.cli import main
from hooks import HookedVLM
from interp.pair import greedy
from interp.pair.pair import Pair
from interp.questions.tasks import REASONING, sample
from interp.results import load_dataset

SMALL = ["--n", "8", "--max-new-tokens", "40", "--batch-size", "4"]


@pytest.fixture(scope="module")
def files(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What both models write on the questions of `SMALL`, as a server keeps it."""
    folder, found = tmp_path_factory.mktemp("traces"), {}
    sizes = [8 // len(REASONING) + (i < 8 % len(REASONING)) for i in range(len(REASONING))]
    examples = [e for task, n in zip(REASONING, sizes, strict=True) for e in sample(task, n, 0, "map")]
    prompts = [pair.builder.build(example) for example in examples]
    for name in ("in", "rl"):
        found[name] = folder / f"{name}.jsonl"
        with found[name].open("w") as file:
            for prompt, ids in zip(prompts, greedy(pair.models[name], prompts, 40), strict=True):
                text = pair.builder.tokenizer.decode(ids, skip_special_tokens=True)
                finish = "stop" if ids[-1] in pair.builder.end_ids else "length"
                row = {"id": prompt.example.id, "text": text, "finish_reason": finish}
                file.write(json.dumps(row) + "\n")
    return found


def test_a_map_of_given_traces_is_that_of_ones_own(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    also = ["--decision", "first", "--points", "mlp_out", "--direction", "rl_to_in"]
    assert main(["map", *SMALL, *also, "--out", str(tmp_path / "own")]) == 0

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("traces are given")

    monkeypatch.setattr(HookedVLM, "generate", never)
    given = ["--traces", *(f"{name}={path}" for name, path in files.items())]
    assert main(["map", *SMALL, *also, *given, "--out", str(tmp_path / "given")]) == 0
    told = capsys.readouterr().err
    assert "are the model's first choice" in told
    own, found = (load_dataset(tmp_path / name / "map.nc") for name in ("own", "given"))
    np.testing.assert_array_equal(own["effect"], found["effect"])
    assert np.abs(own["effect"]).max() > 1e-3
    assert "traces written elsewhere" in (tmp_path / "given" / "report.html").read_text()
    assert "traces written elsewhere" not in (tmp_path / "own" / "report.html").read_text()


def test_questions_without_a_trace_are_left_out_and_named(
    files: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    rows = [json.loads(line) for line in files["rl"].read_text().splitlines()]
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps(row) for row in rows[:5]))
    out = tmp_path / "out"
    given = ["--traces", f"rl={few}", f"in={files['in']}"]
    assert main(["attention", *SMALL, "--no-nulls", *given, "--out", str(out)]) == 0
    assert f"left out: {rows[5]['id']}: RL's trace: no row answers it" in capsys.readouterr().err
    assert pd.read_csv(out / "attention.csv")["n"].max() <= 5


def test_mistakes_are_named(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    strange = tmp_path / "strange.jsonl"
    rows = [json.loads(line) for line in files["rl"].read_text().splitlines()]
    strange.write_text(
        "\n".join(json.dumps({"id": r["id"], "text": "<think> red red red red red"}) for r in rows)
    )
    for given, why in (
        ([f"in={files['in']}", f"in={files['rl']}"], "names the traces of IN twice"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl"),
        ([f"rl={strange}"], "less than 50%"),
    ):
        code = main(["knockout", *SMALL, "--traces", *given, "--out", str(tmp_path / "k")])
        assert code == 2
        assert why in capsys.readouterr().err
