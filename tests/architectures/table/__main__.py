"""`python -m tests.architectures.table --out docs/architectures.md [NAMES]`: measure what is not yet, write.

Each architecture runs in a process of its own and leaves one JSON file, so that a crash or a hang is one row, and a run
that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from tests.architectures import ARCHITECTURES
from tests.architectures.table.page import page
from tests.architectures.table.row import failed_row, row

SECONDS = 600
"""Longer than any row takes; what is not done then hangs."""


def main() -> None:
    """Measure and write the page; the page only where all architectures are measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures.table", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAMES", help="architectures; all if none is named")
    parser.add_argument("--out", type=Path, default=Path("docs/architectures.md"))
    parser.add_argument("--results", type=Path, default=Path("out/architectures"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.names) - set(ARCHITECTURES):
        parser.error(f"no architecture {sorted(unknown)[0]!r}; there are {', '.join(ARCHITECTURES)}")
    if given.one:
        torch.set_num_threads(1)
        json.dump(row(given.one), sys.stdout)
        return
    given.results.mkdir(parents=True, exist_ok=True)
    for name in tqdm(given.names or list(ARCHITECTURES), unit="architecture"):
        file = given.results / f"{name}.json"
        if given.names or not _is_of_now(file):
            file.write_text(json.dumps(_measured(name)))
    files = [given.results / f"{name}.json" for name in ARCHITECTURES]
    if missing := [file.stem for file in files if not file.exists()]:
        print(f"{len(missing)} architectures are not measured yet; the page is written when all are.")
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page([json.loads(file.read_text()) for file in files]))
    print(f"written: {given.out}")


def _is_of_now(file: Path) -> bool:
    if not file.exists():
        return False
    kept = json.loads(file.read_text())
    return (kept["torch"], kept["transformers"]) == (torch.__version__, transformers.__version__)


def _measured(name: str) -> dict[str, Any]:
    """One row, in a process of its own."""
    command = [sys.executable, "-m", "tests.architectures.table", "--one", name]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return failed_row(name, f"not done after {SECONDS} seconds")
    if done.returncode:
        return failed_row(name, (done.stderr.strip().splitlines() or ["it crashed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


main()
