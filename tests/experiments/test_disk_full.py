"""A disk that is full, under every command: one line, exit code 2, nothing half-written, what was there before intact.

The disk is a tmpfs where mounts are allowed (as root), else a stand-in that raises ENOSPC.
"""

import errno
import gc
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import COMMANDS, main
from experiments.commands import claims
from experiments.triple import train
from interp.results import whole
from tests.experiments.test_triple import tiny_config
from tests.interp.results.test_store import full_disk

SIZE = 8 << 20
ROOMS = (0, 20_000, 150_000)
"""Bytes that are left: for nothing, for some parts, for some results."""
FEW = ["--n", "4", "--batch-size", "4", "--max-new-tokens", "40"]
CLAIM = """\
decision: soft
claims:
  - name: block 8 carries half
    component: blocks.8
    at_least: 0.5
"""
ARGS = {
    "map": [*FEW, "--points", "mlp_out", "--decision", "soft"],
    "suite": [*FEW, "--parts", "metrics", "attention"],
    "metrics": FEW,
    "transfer": [*FEW, "--variants", "orders", "--scales", "--ranks", "--controls"],
    "compare": [],
    "localize": [*FEW, "--modes", "suffix", "--kinds", "skip", "--parts", "mlp"],
    "attention": FEW,
    "traces": FEW,
    "lens": [*FEW, "--tuned-steps", "2"],
    "knockout": [*FEW, "--width", "5", "--routes", "image -> question"],
    "lockstep": [*FEW, "--components", "blocks.3.mlp", "--n-random", "1"],
    "planted": [*FEW, "--kinds", "rl", "identical", "--methods", "compare", "--pairs", "2", "--nulls", "1"],
    "trajectory": [*FEW, "--decision", "soft", "--points", "mlp_out"],
    "paths": [*FEW, "--decision", "soft", "--senders", "blocks.6.mlp"],
    "test": ["CLAIMS", *FEW],
}


class Disk:
    """A folder with a limit on what is in it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, patch
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        try:
            self.is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.is_mounted = False

    def leave(self, room: int) -> None:
        """From now on, so many bytes more."""
        if not self.is_mounted:
            full_disk(self._patch, self.folder, room)
            return
        free = shutil.disk_usage(self.folder).free // 4096 * 4096
        (self.folder / "ballast").write_bytes(b"0" * max(0, free - room // 4096 * 4096))

    def make_room(self) -> None:
        self._patch.undo()
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.is_mounted:
            gc.collect()  # what failed may hold files open
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", monkeypatch)
    yield made
    made.close()


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _is_refused(code: int, capsys: Any) -> bool:
    """Exit code 2 and one line beside progress bars; False where all fitted."""
    said = capsys.readouterr().err
    if code == 0:
        return False
    told = [line.rpartition("\r")[2] for line in said.splitlines()]
    told = [line for line in told if line.startswith("frankenlens: ")]
    assert code == 2 and len(told) == 1 and "Traceback" not in said, said
    assert "o space" in told[0], said  # "No space left on device" or "No space is left"
    return True


@pytest.mark.slow
@pytest.mark.parametrize("command", ARGS)
def test_a_full_disk_costs_nothing_that_was_there(
    command: str, disk: Disk, tmp_path: Path, capsys: Any
) -> None:
    out, refused = disk.folder / "out", 0
    (tmp_path / "a.claims.yaml").write_text(CLAIM)
    args = [str(tmp_path / "a.claims.yaml") if one == "CLAIMS" else one for one in ARGS[command]]
    old = disk.folder / "earlier" / "map.nc"
    old.parent.mkdir()
    old.write_bytes(b"an earlier result")
    for room in ROOMS:
        disk.leave(room)
        code = main([command, *args, "--out", str(out)])
        refused += _is_refused(code, capsys)
        disk.make_room()
        assert old.read_bytes() == b"an earlier result"
        if code and out.exists():
            left = [
                path for path in out.rglob("*") if path.is_file() and path.suffix not in (".part", ".json")
            ]
            assert not left and not list(out.glob(".staging-*"))
            assert all(any(path.iterdir()) for path in (out, *out.rglob("*")) if path.is_dir())
    assert refused
    assert main([command, *args, "--out", str(out)]) == 0
    results = _files(out)
    assert out / "report.html" in results
    disk.leave(0)  # the same command once more: the earlier result stays, whole
    assert _is_refused(main([command, *args, "--out", str(out)]), capsys)
    disk.make_room()
    assert {path: data for path, data in _files(out).items() if path in results} == results


def test_every_command_is_here() -> None:
    assert set(COMMANDS) - set(ARGS) == {"train-triple", "freeze"}  # below
    assert claims.COMMAND and whole.is_full(OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-triple", "freeze"])
def test_training_does_not_begin_on_a_full_disk(command: str, disk: Disk, capsys: Any) -> None:
    disk.leave(0)
    assert _is_refused(main([command, "--out", str(disk.folder / "out")]), capsys)
    disk.make_room()
    assert not (disk.folder / "out").exists()


@pytest.mark.slow
def test_training_goes_on_when_there_is_room(disk: Disk) -> None:
    config = tiny_config(disk.folder / "out")
    disk.leave(200_000)
    with pytest.raises(Exception) as error:  # whichever library writes the checkpoint
        train.run(config)
    assert whole.is_full(error.value)
    disk.make_room()
    assert set(train.run(config)) and (config.out / "results.json").exists()
