"""`frankenlens plan` and `--plan`: from configurations alone, and nothing is run."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from experiments import embedded, planning
from experiments.cli import COMMANDS, main
from experiments.frame import Recipe
from hooks import HookedVLM

NUMBERS = ["--n", "40", "--tokens", "60", "--image-tokens", "16", "--trace-tokens", "8", "--rate", "1TFLOP/s"]


@pytest.fixture
def weightless_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder without weights, and models that must not be loaded or run."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    shutil.copy(embedded.path("in") / "config.json", folder)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan runs nothing")

    monkeypatch.setattr(HookedVLM, "from_pretrained", never)
    monkeypatch.setattr(HookedVLM, "__call__", never)
    return ["--in", str(folder), "--rl", str(folder)]


def test_a_map_is_planned_without_weights(
    weightless_pair: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "planned"
    assert main(["plan", "map", *weightless_pair, *NUMBERS, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "component map" in told and "weights of RL" in told
    found = json.loads((out / "plan.json").read_text())
    assert found["flops"] == pytest.approx(sum(work["flops"] for work in found["works"]))
    assert found["seconds"] == pytest.approx(found["flops"] / 1e12)
    assert main(["map", "--plan", *weightless_pair, *NUMBERS]) == 0
    assert capsys.readouterr().out in told


def test_twice_the_prompts_take_twice_the_time_and_the_same_memory(weightless_pair: list[str]) -> None:
    few, many = (_plan(*weightless_pair, *NUMBERS[2:], "--n", n) for n in ("400", "800"))
    of_prompts = [sum(work.flops for work in one.works if work.scales) for one in (few, many)]
    assert of_prompts[1] == pytest.approx(2 * of_prompts[0]) and few.peak == many.peak


def test_workers_share_prompts_and_devices_weights(weightless_pair: list[str]) -> None:
    one = _plan(*weightless_pair, *NUMBERS)
    shared = _plan(*weightless_pair, *NUMBERS, "--workers", "4", "--devices", "2")
    assert one.seconds / 4 < shared.seconds < one.seconds
    assert shared.held["weights of IN"] == one.held["weights of IN"] // 2
    assert "once a worker" in shared.table() and "one after another" in shared.table()


def test_what_does_not_fit_says_what_would(weightless_pair: list[str]) -> None:
    whole = _plan(*weightless_pair, *NUMBERS)
    cut = _plan(*weightless_pair, *NUMBERS, "--device-memory", str(whole.peak // 2))
    (size,) = [one.split()[1] for one in cut.cuts if one.startswith("--batch-size")]
    assert _plan(*weightless_pair, *NUMBERS, "--batch-size", size).peak <= whole.peak // 2
    assert "--devices" in "".join(_plan(*weightless_pair, *NUMBERS, "--device-memory", "1MB").cuts)


def test_variants_that_write_together_are_planned_without_weights(weightless_pair: list[str]) -> None:
    def works(*args: str) -> dict[str, Any]:
        command = import_module(COMMANDS["transfer"][0]).COMMAND
        made = planning.plan("transfer", command, [*weightless_pair, *NUMBERS, *args])
        return {work.what: work for work in made.works}

    found = works("--variants", "orders", "--scales", "--ranks", "2", "--controls")
    assert found["answers of 1 models"].runs == found["answers of 1 variants alone"].runs  # RL; rank 2
    together = found["answers of 7 that write together"]
    assert together.runs == 7 * found["answers of 1 models"].runs
    assert together.flops < 0.75 * 7 * found["answers of 1 models"].flops
    assert not found["whether variants can write together"].scales
    assert together.held["what variants have in common on a batch"] > 0
    alone = works("--variants", "--scales", "0.5", "--ranks", "--controls")
    assert not any("together" in what for what in alone) and "answers of 2 models" in alone


def test_questions_are_read_where_no_numbers_are_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _plan("--n", "5", "--trace-tokens", "4", "--rate", "1TFLOP/s", "--points", "attn_out")
    assert any("5 prompts like the 5 at hand" in one for one in made.assumed)


CLAIMS = """\
claims:
  - {name: head, component: blocks.4.attn.head.1, at_least: 0.2}
  - {name: both, component: [blocks.3.mlp, blocks.5.attn], quantity: effect, at_least: 0.1, direction: in_to_rl}
  - {name: region, component: Late, body: weights, quantity: accuracy, at_least: 0.1}
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_plan_from_a_configuration_alone(
    name: str, weightless_pair: list[str], tmp_path: Path
) -> None:
    (tmp_path / "claims.yaml").write_text(CLAIMS)
    for one in ("train", "measure"):
        (tmp_path / f"{one}.jsonl").write_text("{}")
    data = ["--train", str(tmp_path / "train.jsonl"), "--data", str(tmp_path / "measure.jsonl")]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    own = {
        "compare": [*weightless_pair, *NUMBERS[-2:]],
        "train-triple": ["--out", str(tmp_path / "triple"), *NUMBERS[-2:]],
        "test": [str(tmp_path / "claims.yaml"), *weightless_pair, *NUMBERS],
        "freeze": [*weightless_pair, *NUMBERS, *data],
        "merge": [weightless_pair[1], str(adapter), "--out", str(tmp_path / "merged"), *NUMBERS[-2:]],
        "patterns": ["blocks.0", *weightless_pair[:2], *NUMBERS[-2:]],
    }
    args = own.get(name, [*weightless_pair, *NUMBERS])
    made = planning.plan(name, import_module(COMMANDS[name][0]).COMMAND, args)
    if name != "patterns":  # which looks names up, and computes nothing
        assert made.flops > 0 and made.peak > 0
    assert made.seconds == pytest.approx(made.flops / 1e12)
    assert all(work.flops >= 0 and work.peak >= 0 for work in made.works)


def test_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    assert f"planned: {', '.join(COMMANDS)}" in capsys.readouterr().out


def test_what_has_no_plan_is_refused_by_name() -> None:
    with pytest.raises(Exception, match="no plan of mine"):
        planning.plan("mine", Recipe(object, print), [])


def test_a_suite_is_the_sum_of_its_parts(weightless_pair: list[str]) -> None:
    def flops(name: str, *args: str) -> float:
        command = import_module(COMMANDS[name][0]).COMMAND
        return planning.plan(name, command, [*weightless_pair, *args, *NUMBERS]).flops

    whole = flops("suite", "--parts", "metrics", "attention")
    assert whole == pytest.approx(flops("metrics") + flops("attention"))


def test_two_mistakes(weightless_pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "map", *weightless_pair, "--n", "4"]) == 2
    assert "state --tokens" in capsys.readouterr().err
    assert main(["plan", "map", *weightless_pair, *NUMBERS[:-1], "fast"]) == 2
    assert "no rate" in capsys.readouterr().err


def _plan(*args: str) -> Any:
    return planning.plan("map", import_module(COMMANDS["map"][0]).COMMAND, args)
