"""`--traces`: commands on traces that were written elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

from experiments.cli import main
from hooks import FrankenlensError, HookedVLM
from interp.pair import greedy
from interp.pair.elsewhere import Here, Vllm, Writer, read_traces
from interp.pair.pair import Pair
from interp.questions.tasks import REASONING, sample
from interp.results import load_dataset

SMALL = ["--n", "8", "--max-new-tokens", "40", "--batch-size", "4"]


@pytest.fixture(scope="module")
def files(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What both models write on the questions of `SMALL`, as a server keeps it."""
    folder, found = tmp_path_factory.mktemp("traces"), {}
    examples = [e for task, n in zip(REASONING, _sizes(), strict=True) for e in sample(task, n, 0, "map")]
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
    strange = [{"id": "nope", "text": "hello"}, {"id": "empty"}]
    few.write_text("\n".join(json.dumps(row) for row in [*rows[:5], *strange]))
    out = tmp_path / "out"
    given = ["--traces", f"rl={few}", f"in={files['in']}"]
    assert main(["attention", *SMALL, "--no-nulls", *given, "--out", str(out)]) == 0
    told = capsys.readouterr().err
    assert f"left out: {rows[5]['id']}: RL's trace: no row answers it" in told
    assert "1 rows answer none of the questions asked: 6" in told and "row 7 holds no reply" in told
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


def test_traces_that_are_written_are_read_again(pair: Pair, files: dict[str, Path], tmp_path: Path) -> None:
    """Token for token; and by others: text, finish, and the prompt with one placeholder for its image."""
    out = tmp_path / "traces"
    assert main(["traces", *SMALL, "--out", str(out)]) == 0
    examples = [e for task, n in zip(REASONING, _sizes(), strict=True) for e in sample(task, n, 0, "map")]
    prompts = [pair.builder.build(example) for example in examples]
    for name in ("in", "rl"):
        written = greedy(pair.models[name], prompts, 40)
        given = [read_traces(path, prompts) for path in (out / f"{name}.jsonl", files[name])]
        for found in given:
            assert [list(found.ids[p.example.id]) for p in prompts] == written
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert all(row["model"] == name and row["text"] for row in rows)
        image = pair.builder.image_token_id
        assert all(row["prompt_token_ids"].count(image) == 1 for row in rows)
    table = pd.read_csv(out / "traces.csv")
    assert table["n"].tolist() == [8, 8] and (table["right_low"] <= table["right"]).all()


class StandIn:
    """Speaks vLLM's interface: `LLM(model=...).generate(requests, SamplingParams)`; writes by the opened model."""

    asked: ClassVar[list[Any]] = []
    pair: ClassVar[Any] = None
    prompts: ClassVar[list[Any]] = []

    def __init__(self, model: str, **engine: Any) -> None:
        self._model, self._engine = model, engine

    def generate(self, requests: list[dict[str, Any]], settings: Any) -> list[Any]:
        type(self).asked += [(self._model, self._engine, requests, settings)]
        written = greedy(self.pair.rl, self.prompts, settings.max_tokens)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in written]


def test_an_engine_is_asked_for_what_is_asked_here(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = [pair.builder.build(example) for example in sample("sum", 3, seed=0, split="map")]
    StandIn.pair, StandIn.prompts = pair, prompts
    vllm = SimpleNamespace(LLM=StandIn, SamplingParams=lambda **given: SimpleNamespace(**given))
    with pytest.raises(FrankenlensError, match=r"pip install 'frankenlens\[vllm\]'"):
        Vllm("rl").write(prompts, 40)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    writer = Vllm("rl", {"tensor_parallel_size": 2})
    assert isinstance(writer, Writer) and isinstance(Here(pair.rl), Writer)
    assert writer.write(prompts, 40) == Here(pair.rl).write(prompts, 40)
    ((model, engine, requests, settings),) = StandIn.asked
    assert (model, engine) == ("rl", {"tensor_parallel_size": 2})
    assert settings.temperature == 0.0 and set(settings.stop_token_ids) == set(pair.builder.end_ids)
    for request, prompt in zip(requests, prompts, strict=True):
        assert request["prompt_token_ids"].count(pair.builder.image_token_id) == 1
        assert request["multi_modal_data"]["image"][0].size == prompt.example.images[0].size
    assert set(settings.logit_bias) <= set(pair.builder.suppressed_ids) and settings.logit_bias


def _sizes() -> list[int]:
    return [8 // len(REASONING) + (i < 8 % len(REASONING)) for i in range(len(REASONING))]
