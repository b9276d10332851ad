"""Thousands of rows of somebody's JSONL with an image each, through a command in a process of its own.

Run as `python -m tests.real_data N COMMAND [OPTION ...]`: writes the rows, runs the command on them, and prints as JSON
what it took along the way; `--kill SECONDS` (before the command) kills it then, once, and runs it again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.questions.tasks import sample
from interp.results import load_dataset

STEP = 0.5
"""Seconds between looks."""


def write_rows(n: int, folder: Path, task: str = "sum") -> Path:
    """`folder/rows.jsonl`, a question, an answer and a PNG of its own in each row."""
    (folder / "images").mkdir(parents=True)
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, example in enumerate(sample(task, n, seed=0, split="map")):
            name = f"images/{number:05d}.png"
            (image,) = example.images
            image.save(folder / name)
            row = {
                "id": f"row-{number}",
                "question": example.question,
                "answer": example.answer,
                "image": name,
            }
            file.write(json.dumps(row) + "\n")
    return path


@dataclass
class Watched:
    """What a process took.

    Attributes:
        seconds: from its start to its end.
        first: to the first finished part in its folder.
        looks: seconds, CPU seconds, bytes of main memory and finished parts, along the way.
    """

    seconds: float = 0.0
    first: float | None = None
    looks: list[tuple[float, float, int, int]] = field(default_factory=list)


def watch(command: Sequence[str], folder: Path, kill: float | None = None) -> Watched:
    """Run a command in a folder of its own to its end, or to the second at which it is killed."""
    folder.mkdir(exist_ok=True)
    found, start = Watched(), time.monotonic()
    told = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe that nobody reads would stop it
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=told)
    while process.poll() is None:
        now = time.monotonic() - start
        parts = sum(len(names) for place, _, names in os.walk(folder) if "finished" in Path(place).parts)
        if parts and found.first is None:
            found.first = now
        if resident := _resident(process.pid):
            found.looks.append((now, _cpu(process.pid), resident, parts))
        if kill is not None and now > kill:
            process.send_signal(signal.SIGKILL)
        time.sleep(STEP)
    found.seconds = time.monotonic() - start
    if process.returncode and kill is None:
        told.seek(0)
        raise RuntimeError(told.read())
    return found


def _resident(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def files(out: Path) -> dict[str, Any]:
    """What a run leaves, by name, up to its date; all but the parts that it went on from."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or "finished" in path.parts or path.name == ".lock":
            continue
        if path.suffix == ".nc":
            dataset = load_dataset(path)
            found[path.name] = repr(dataset.drop_attrs().to_dict()), _dateless(str(dataset.attrs).encode())
        else:
            found[path.name] = _dateless(path.read_bytes())
    return found


def _dateless(data: bytes) -> bytes:
    return re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", b"DATE", data)


def told(found: Watched, points: int = 10) -> dict[str, Any]:
    """In a few figures."""
    every = max(1, len(found.looks) // points)
    return {
        "seconds": round(found.seconds),
        "first result after": found.first and round(found.first, 1),
        "peak MiB": max(look[2] for look in found.looks) >> 20,
        "along the way (s, CPU s, MiB, parts)": [
            (round(s), round(cpu), memory >> 20, parts) for s, cpu, memory, parts in found.looks[::every]
        ],
    }


def main() -> None:
    """Prints what the command took; with `--kill`, also whether it left the same bytes."""
    n, rest = int(sys.argv[1]), sys.argv[2:]
    kill = float(rest[1]) if rest[0] == "--kill" else None
    name, *options = rest[2:] if kill is not None else rest
    program = [str(Path(sys.executable).with_name("frankenlens")), name]
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(n, Path(folder) / "data")

        # what stands in results, the name of their folder too, is the same
        command = [*program, "--data", str(data), "--n", str(n), "--out", "out", *options]
        whole = Path(folder) / "whole"
        print(json.dumps(told(watch(command, whole)), indent=1), flush=True)
        if kill is not None:
            again = Path(folder) / "again"
            print(json.dumps(told(watch(command, again, kill)), indent=1), flush=True)
            print(json.dumps(told(watch(command, again)), indent=1))
            one, other = files(whole), files(again)
            print({name: one[name] == other.get(name) for name in sorted(one)})


if __name__ == "__main__":
    main()
