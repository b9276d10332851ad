"""`--ray`: which commands take it, what goes with it, and that their files are those of one process."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import COMMANDS, main
from experiments.frame import Command
from experiments.on_ray import ON_RAY
from experiments.settings import PairSettings
from hooks.errors import FrankenlensError
from tests.experiments.test_kills import COMMANDS as SMALL
from tests.experiments.test_kills import _results, _same

BATCHES: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 40}
JOBS: dict[str, dict[str, Any]] = {
    **{name: SMALL[name][1] for name in ("map", "metrics", "transfer", "planted", "lockstep")},
    "knockout": {"n": 8, "layers": "singles", "routes": ("image -> question",), **BATCHES},
    "lens": {"n": 8, "tuned_steps": 4, **BATCHES},
}


def _command(name: str) -> Command[Any, Any, Any]:
    return importlib.import_module(COMMANDS[name][0]).COMMAND


def test_the_commands_that_are_named_are_those_that_share_their_parts() -> None:
    able = {name for name in COMMANDS if getattr(_command(name), "on_ray", False)}
    assert able == set(ON_RAY) == set(JOBS)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(ON_RAY)))
def test_others_refuse_it_and_name_those(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _command(name)
    if not isinstance(command, Command) or not issubclass(command.settings, PairSettings):
        assert "ray" not in {one.name for one in fields(command.settings)}  # then the option is not known
        return
    with pytest.raises(
        FrankenlensError, match="--ray is of knockout, lens, lockstep, map, metrics, planted, transfer"
    ):
        command.run(command.settings(out=tmp_path / "out", ray="auto"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus_per_model": 1}, "--gpus-per-model 1 without --device-map .* give --device-map cuda"),
        ({"gpus_per_model": 2}, "give --device-map auto"),
        ({"device_map": "cuda"}, "--device-map cuda with --ray needs --gpus-per-model"),
        ({"gpus_per_model": -1}, "--gpus-per-model is -1"),
    ],
)
def test_gpus_and_device_map_go_together(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    command = _command("map")
    with pytest.raises(FrankenlensError, match=said):
        command.run(command.settings(out=tmp_path / "out", ray="auto", **settings))


def test_gpus_need_ray(tmp_path: Path) -> None:
    command = _command("map")
    with pytest.raises(FrankenlensError, match="--gpus-per-model 2 needs --ray"):
        command.run(command.settings(out=tmp_path / "out", gpus_per_model=2))


def test_what_is_written_on_one_machine_is_refused(tmp_path: Path) -> None:
    lens, planted = _command("lens"), _command("planted")
    with pytest.raises(FrankenlensError, match="--lenses is a folder of one machine"):
        lens.run(lens.settings(out=tmp_path / "out", ray="auto", lenses=tmp_path / "lenses"))
    with pytest.raises(FrankenlensError, match="supervised are trained in a folder of one machine"):
        planted.run(planted.settings(out=tmp_path / "out", ray="auto", kinds=("supervised",)))


def test_a_client_address_and_no_cluster_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    asked = ["map", "--n", "2", "--out", str(tmp_path / "out"), "--ray"]
    assert main([*asked, "ray://head:10001"]) == 2
    assert "address of Ray's client" in capsys.readouterr().err
    assert main([*asked, "127.0.0.1:1"]) == 2
    assert "there is no Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def _parts(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.part")}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(JOBS))
def test_all_files_are_those_of_one_process(name: str, tmp_path: Path, ray_here: None) -> None:
    command = _command(name)
    one, two = tmp_path / "one", tmp_path / "two"
    command.run(command.settings(out=one, **JOBS[name]))
    command.run(command.settings(out=two, ray="auto", **JOBS[name]))
    expected = _results(name, one)
    assert {".csv", ".nc", ".png", ".html"} >= {Path(file).suffix for file in expected} and expected
    assert _same(_results(name, two), expected)
    assert _parts(two) == _parts(one)
    assert not list(two.rglob(".lock"))


@pytest.mark.slow
def test_a_run_that_was_begun_by_one_process_is_ended_by_two(tmp_path: Path, ray_here: None) -> None:
    command, out = _command("map"), tmp_path / "out"
    command.run(command.settings(out=tmp_path / "one", **JOBS["map"]))
    command.run(command.settings(out=out, **JOBS["map"]))
    parts = sorted(out.rglob("*.part"))
    kept = {path: path.stat().st_mtime_ns for path in parts[::2]}
    for path in parts[1::2]:
        path.unlink()
    command.run(command.settings(out=out, ray="auto", **JOBS["map"]))
    assert _same(_results("map", out), _results("map", tmp_path / "one"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # none was made again
    assert sorted(out.rglob("*.part")) == parts
