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
from experiments.options import from_command_line
from hooks import HookedVLM
from interp.pair.pair import Pair
from tests.interp.plan.test_map_plans import counted

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


def test_a_command_without_a_count_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-triple", "freeze"):
        assert main(["plan", name]) == 2
        assert f"no plan of {name}" in capsys.readouterr().err
    assert main(["plan"]) == 0
    assert "planned: map" in capsys.readouterr().out


def test_two_mistakes(weightless_pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "map", *weightless_pair, "--n", "4"]) == 2
    assert "state --tokens" in capsys.readouterr().err
    assert main(["plan", "map", *weightless_pair, *NUMBERS[:-1], "fast"]) == 2
    assert "no rate" in capsys.readouterr().err


def _plan(*args: str) -> Any:
    return planning.plan("map", import_module(COMMANDS["map"][0]).COMMAND, args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "args"),
    [
        ("attention", 13, ""),
        ("metrics", 8, ""),
        ("transfer", 8, "--variants factors --ranks --scales 0.5 --controls --dtype float32"),
        ("transfer", 8, "--variants orders parts --ranks --scales --controls layers --dtype float32"),
        ("map", 8, "--batch-size 2 --points attn_out --decision soft --direction rl_to_in"),
    ],
)
def test_flops_of_whole_commands(name: str, tokens: int, args: str, tmp_path: Path) -> None:
    command = import_module(COMMANDS[name][0]).COMMAND
    given = ["--n", "4", "--max-new-tokens", str(tokens), "--unparsed", "1", "--out", str(tmp_path)]
    given += args.split()
    config = from_command_line(command.settings, given, name)
    settings = planning.PlanSettings(trace_tokens=tokens, rate="1TFLOP/s")
    planned = planning.planned(name, command, config, settings)
    pair = Pair.from_pretrained(*(embedded.path(one) for one in ("in", "rl", "base")))
    measure = command.prepare(config)
    assert planned.flops == pytest.approx(counted(lambda: list(measure(pair))), rel=0.1)
