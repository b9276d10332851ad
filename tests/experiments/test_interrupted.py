"""Ctrl-C, at whatever moment, is one line and exit code 130, and leaves no empty folder."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import frankenlens

SMALL = ["map", "--n", "8", "--points", "mlp_out", "--max-new-tokens", "24", "--batch-size", "4"]
AT_IMPORT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

import frankenlens
sys.meta_path.insert(0, Finder())
sys.exit(frankenlens.main())
"""
LATER = """
import signal, sys, frankenlens
signal.signal(signal.SIGINT, signal.default_int_handler)
print("begun", flush=True)
sys.exit(frankenlens.main())
"""


def _started(code: str, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *SMALL, "--out", str(out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, text=True, cwd=Path(__file__).parents[2], stdout=pipe, stderr=pipe)


def _require_one_line(process: subprocess.Popen[str], out: Path) -> None:
    """130, one line that is no progress bar, and neither results nor an empty folder."""
    said = process.communicate(timeout=600)[1]
    lines = [line.rpartition("\r")[2] for line in said.splitlines()]
    lines = [line for line in lines if line.strip() and "|" not in line and "it/s" not in line]
    told = [line for line in lines if "traces can be read" not in line]
    assert process.returncode == 130 and len(told) == 1, said
    assert told[0].startswith("frankenlens: interrupted")
    folders = [path for path in (out, *out.rglob("*")) if path.is_dir()]
    assert all(any(path.iterdir()) for path in folders) and not list(out.glob("*.*"))


@pytest.mark.parametrize("module", ["experiments.cli", "torch"])
def test_an_interrupted_import_is_one_line(module: str, tmp_path: Path) -> None:
    _require_one_line(_started(AT_IMPORT.format(module=module), tmp_path / "out"), tmp_path / "out")


@pytest.mark.slow
def test_interrupted_at_many_moments(tmp_path: Path) -> None:
    rng, cut_short = random.Random(0), 0
    for trial in range(20):
        process = _started(LATER, tmp_path / str(trial))
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0, 15))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            _require_one_line(process, tmp_path / str(trial))
            cut_short += 1
    assert cut_short >= 10


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, own)


def test_an_interruption_in_a_finalizer_is_not_lost(ctrl_c, monkeypatch, capsys) -> None:
    class Late:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    class Module:
        @staticmethod
        def main(argv: object) -> int:
            late = Late()
            del late
            for _ in range(200):
                time.sleep(0.05)
            return 0

    monkeypatch.setattr(frankenlens, "import_module", lambda name: Module)
    assert frankenlens.main([]) == 130
    said = capsys.readouterr().err.strip().splitlines()
    assert said == ["frankenlens: interrupted"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_an_import_makes_of_an_interruption_is_an_interruption(ctrl_c, monkeypatch, capsys) -> None:
    def import_module(name: str) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("numpy failed to import") from error

    monkeypatch.setattr(frankenlens, "import_module", import_module)
    assert frankenlens.main([]) == 130
    assert capsys.readouterr().err == "frankenlens: interrupted\n"
