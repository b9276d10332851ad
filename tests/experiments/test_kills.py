"""Commands that are killed, and the same command after it: the same files, and nothing done twice that was finished.

One moment of the map in the default suite; `make kills` tries twenty of each command.
"""

import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.commands import localize as localization
from experiments.commands import lockstep, map, metrics, planted, suite, transfer
from experiments.frame import Command
from interp.results import load_dataset
from interp.sweep import Intervention, sweep
from tests.interp.sweep.test_sweep import duo

MOMENTS = int(os.environ.get("KILLS", "20"))
BATCHES: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 40}
PLANTED = {"kinds": ("rl", "identical"), "methods": ("compare",), "pairs": 2, "nulls": 1, "noise_pairs": 3}
NOTHING: Any = {"scales": (), "ranks": (), "controls": ()}
COMMANDS: dict[str, tuple[Command[Any, Any, Any], dict[str, Any]]] = {
    "map": (map.COMMAND, {"n": 8, "points": ("mlp_out",), "decision": "first", **BATCHES}),
    "transfer": (transfer.COMMAND, {"n": 4, "variants": ("orders",), **NOTHING, **BATCHES}),
    "planted": (planted.COMMAND, {"n": 6, **PLANTED, **BATCHES}),
    "suite": (suite.COMMAND, {"n": 4, "parts": ("metrics", "attention", "transfer"), **BATCHES}),
    "metrics": (metrics.COMMAND, {"n": 8, **BATCHES}),
    "lockstep": (lockstep.COMMAND, {"n": 8, "components": ("blocks.3.mlp",), "n_random": 1, **BATCHES}),
    "localize": (
        localization.COMMAND,
        {"n": 2, "modes": ("suffix",), "kinds": ("skip",), "parts": ("mlp",), **BATCHES},
    ),
}


def _run(command: str, out: Path) -> None:
    """In this process."""
    if command == "sweep":
        pair = duo("qwen2_5_vl")
        wanted = [
            Intervention(f"blocks.{i}.attn.hook_z", "zero", "image", h) for i in range(3) for h in range(4)
        ]
        found = sweep(
            pair.recipient, pair.prompts, wanted, pair.metrics, batch_size=1, out=out, progress=False
        )
        found.to_netcdf(out.with_name("sweep.tmp"), engine="h5netcdf")
        out.with_name("sweep.tmp").replace(out.with_name("sweep.nc"))
        return
    one, settings = COMMANDS[command]
    one.run(one.settings(out=out, **settings))


def _begun(command: str, out: Path) -> int:
    """The process that runs it: a fork, so that nothing is imported anew."""
    child = os.fork()
    if child:
        return child
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    code = 1
    try:
        torch.set_num_threads(1)
        _run(command, out)
        code = 0
    finally:
        os._exit(code)


def _done(command: str, out: Path) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(_begun(command, out), 0)[1]) == 0


def _results(command: str, out: Path) -> dict[str, Any]:
    """What it wrote, up to date and path."""
    if command == "sweep":
        return {path.name: path.read_bytes() for path in out.glob("*.part")}
    found: dict[str, Any] = {}
    for path in sorted(out.glob("*.*")):
        if path.suffix == ".nc":
            dataset = load_dataset(path)
            found[path.name] = dataset.drop_attrs().to_dict(), _dateless(str(dataset.attrs), out)
        elif path.is_file() and path.name != ".lock":
            found[path.name] = _dateless(path.read_bytes().decode("latin-1"), out)
    assert not list(out.glob(".staging-*")) and not (out / ".publishing").exists()
    return found


def _dateless(text: str, out: Path) -> str:
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "DATE", text)
    return text.replace(str(out), "OUT")


def _parts(out: Path) -> dict[Path, tuple[int, int]]:
    """Finished parts, and when each was written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*.part")}


def _wait_for_a_part(out: Path) -> None:
    until = time.monotonic() + 120
    while not _parts(out):
        assert time.monotonic() < until
        time.sleep(0.01)


def _same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # NaN is NaN


def _killed_and_resumed(command: str, tmp_path: Path, moments: int, least: float) -> None:
    begun = time.perf_counter()
    _done(command, tmp_path / "whole")
    took = time.perf_counter() - begun
    whole, parts = _results(command, tmp_path / "whole"), len(_parts(tmp_path / "whole"))
    assert parts >= 3
    rng, cut_short, kept = random.Random(command), 0, 0
    for trial in range(moments):
        out = tmp_path / str(trial)
        child = _begun(command, out)
        if moments == 1:  # when something is finished
            _wait_for_a_part(out)
        else:
            time.sleep(rng.uniform(0.1, 0.95) * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = _parts(out) if out.is_dir() else {}
        cut_short += len(before) < parts
        kept += len(before)
        _done(command, out)
        assert _same(_results(command, out), whole), trial
        after = _parts(out)
        assert {path: after[path] for path in before} == before  # none was made again
        assert len(after) == parts
    print(
        f"{command}: {moments} kills, {cut_short} before its parts were finished, {kept} parts kept",
        file=sys.__stdout__,
    )
    assert cut_short >= least * moments and kept


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_map_goes_on_where_it_was(tmp_path: Path) -> None:
    _killed_and_resumed("map", tmp_path, 1, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "command", ["map", "sweep", "transfer", "planted", "suite", "metrics", "lockstep", "localize"]
)
def test_killed_at_many_moments(command: str, tmp_path: Path) -> None:
    _killed_and_resumed(command, tmp_path, MOMENTS, 0.25)
