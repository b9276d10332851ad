"""Commands on a pair with one model in memory: what they write is what they write of two models, byte for byte."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from experiments import planning
from experiments.cli import COMMANDS
from experiments.options import from_command_line
from hooks.resident import Turns

TEXT = {"batch_size": 16, "max_new_tokens": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    "map": {"n": 16, "points": ("mlp_out", "head"), "decision": "first", **TEXT},
    "metrics": {"n": 8, **TEXT},
    "transfer": {"n": 12, "addresses": ("blocks.3.attn.head.1",), **TEXT},
    "lens": {"n": 16, "tuned_steps": 12, "batch_size": 16},
    "lockstep": {"n": 32, "batch_size": 32, "max_new_tokens": 16, "n_random": 1, "top": (2,)},
    "knockout": {"n": 12, "batch_size": 12, "max_new_tokens": 48, "width": 5},
    "paths": {"n": 24, "decision": "first", "batch_size": 16, "max_new_tokens": 48},
}


def written(name: str, out: Path, one_resident: bool) -> None:
    command = import_module(COMMANDS[name][0]).COMMAND
    command.run(command.settings(out=out, one_resident=one_resident, **SETTINGS[name]))


@pytest.mark.parametrize(
    "name",
    ["metrics", *(pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name != "metrics")],
)
def test_a_command_writes_what_it_writes_of_two_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[Turns] = []
    turned = Turns.to

    def counted(self: Turns, side: Any) -> None:
        turns.append(self)
        turned(self, side)

    monkeypatch.setattr(Turns, "to", counted)
    for one_resident in (False, True):
        assert not turns
        written(name, tmp_path / str(one_resident), one_resident)
    assert turns[0].switches > 2
    files = sorted(
        path.relative_to(tmp_path / "False") for path in (tmp_path / "False").iterdir() if path.is_file()
    )
    assert len(files) > 2
    for file in files:
        two, one = (tmp_path / way / file for way in ("False", "True"))
        if file.suffix == ".nc":
            with xr.open_dataset(two) as a, xr.open_dataset(one) as b:
                assert a.load().equals(b.load()), file
        elif file.suffix != ".html":  # which shows the settings
            assert two.read_bytes() == one.read_bytes(), file


def planned(name: str, *args: str) -> Any:
    command = import_module(COMMANDS[name][0]).COMMAND
    given = [
        "--n",
        "40",
        "--tokens",
        "60",
        "--image-tokens",
        "16",
        "--trace-tokens",
        "8",
        "--rate",
        "1TFLOP/s",
    ]
    settings, config = planning.read(name, command, [*given, *args])
    return planning.planned(name, command, config, settings)


def test_the_plan_has_what_differs_in_the_place_of_rl_and_what_changing_over_moves() -> None:
    two = planned("map", "--dtype", "bfloat16")
    one = planned("map", "--dtype", "bfloat16", "--one-resident", "--changed", "0.2")
    whole = two.weights["RL"]
    assert sum(one.weights.values()) / sum(two.weights.values()) == pytest.approx(
        (1 + 1 / 16 + 0.2) / 2, rel=1e-3
    )
    assert one.turning.moved == pytest.approx((2 + 1 / 16 + 0.2) * whole, rel=1e-3)
    assert one.disk == two.disk and one.flops == two.flops
    assert "RL differs in 20.0% of the entries, as stated" in one.table()
    assert one.data()["turning"]["turns"] == one.turns > 0
    assert two.turning is None and "turning" not in two.data()


def test_the_share_is_that_of_the_checkpoints_where_they_are_at_hand() -> None:
    """Every entry of the embedded pair differs in float32, and a part of them in bfloat16."""
    assert planned("metrics", "--one-resident").turning.share > 0.99
    assert planned("metrics", "--one-resident", "--dtype", "bfloat16").turning.share < 0.9


@pytest.mark.slow
def test_memory_changes_over_at_most_as_often_as_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[Turns] = []
    ended = Turns.end
    monkeypatch.setattr(Turns, "end", lambda self: (turns.append(self), ended(self))[1])
    written("map", tmp_path, True)
    command = import_module(COMMANDS["map"][0]).COMMAND
    args = "--one-resident --n 16 --points mlp_out head --decision first --batch-size 16 --max-new-tokens 40"
    config = from_command_line(command.settings, args.split(), "map")
    plan = planning.planned("map", command, config, planning.PlanSettings(rate="1TFLOP/s"))
    assert 0 < turns[0].switches <= plan.turns
