"""Ctrl-C, at whatever moment, is one line and exit code 130, and leaves no empty folder."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import frankenlens

SMALL = ["--n", "8", "--points", "mlp_out", "--max-new-tokens", "24", "--batch-size", "4"]


def _interrupted(seconds: float, out: Path) -> tuple[int, list[str]]:
    """Exit code, and the lines on standard error that are no progress bar."""
    command = [sys.executable, "-c", "import sys, frankenlens; sys.exit(frankenlens.main())", "map", *SMALL]
    started = subprocess.Popen(
        [*command, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    time.sleep(seconds)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=300)[1]
    lines = [line.rpartition("\r")[2] for line in said.splitlines()]
    return started.returncode, [
        line for line in lines if line.strip() and "|" not in line and "it/s" not in line
    ]


def _require_clean(code: int, lines: list[str], out: Path) -> None:
    assert code == 130 and len(lines) == 1 and lines[0].startswith("frankenlens: interrupted"), (code, lines)
    empty = [path for path in (out, *out.rglob("*")) if path.is_dir() and not any(path.iterdir())]
    assert not empty and not list(out.glob("*.*"))


def test_an_interrupted_import_is_one_line(tmp_path: Path) -> None:
    _require_clean(*_interrupted(1.5, tmp_path / "out"), tmp_path / "out")


@pytest.mark.slow
def test_interrupted_at_many_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(20):
        seconds = rng.uniform(0.5, 12)
        out = tmp_path / str(trial)
        code, lines = _interrupted(seconds, out)
        if code != 0:  # it was faster
            _require_clean(code, lines, out)


def test_an_interruption_in_a_finalizer_is_not_lost(monkeypatch, capsys) -> None:
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


def test_what_an_import_makes_of_an_interruption_is_an_interruption(monkeypatch, capsys) -> None:
    def import_module(name: str) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("numpy failed to import") from error

    monkeypatch.setattr(frankenlens, "import_module", import_module)
    assert frankenlens.main([]) == 130
    assert capsys.readouterr().err == "frankenlens: interrupted\n"
