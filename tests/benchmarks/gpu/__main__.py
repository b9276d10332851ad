"""The command: `python -m tests.benchmarks.gpu --out DIR`. Each group of steps is a process of its own.

What a step finds is in `DIR/DATE-DEVICE.json` before the next begins; one that fails, or takes longer than it may, is
recorded there with its error, and the others go on. The exit code is 1 where any did.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu import needed

GROUPS = ("exactness", "devices", "qwen2_5_vl", "qwen3_vl", "llama")
START = 20
"""Seconds that a process may take to import what it needs, and to stop."""


def main() -> int:
    """0 where every step went well."""
    asked = arguments()
    if code := needed.main():
        return code
    if asked.worker:
        return work(asked.worker, asked)
    about = machine(asked)
    if about.get("error"):
        print(about["error"], file=sys.stderr)
        return 2
    return run_all(asked, about)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("tests/benchmarks/results"), help="folder of results"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (with --shape tiny)")
    parser.add_argument(
        "--shape", default="full", choices=("full", "tiny"), help="tiny: to try the steps out"
    )
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=GROUPS, help="groups of steps")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def machine(asked: argparse.Namespace) -> dict[str, Any]:
    """What it runs on, asked of another process, so that this one holds nothing of the device."""
    said = subprocess.run(
        [*worker("machine", asked)], capture_output=True, text=True, timeout=120, check=False
    )
    if said.returncode:
        return {"error": said.stderr.strip().splitlines()[-1] if said.stderr.strip() else "no machine"}
    return json.loads(said.stdout.strip().splitlines()[-1])


def worker(group: str, asked: argparse.Namespace, *more: str) -> list[str]:
    """The command of a process."""
    flags = ["-S"] if sys.flags.no_site else []
    own = [sys.executable, *flags, "-m", "tests.benchmarks.gpu", "--worker", group]
    return [*own, "--device", asked.device, "--shape", asked.shape, *more]


def run_all(asked: argparse.Namespace, about: dict[str, Any]) -> int:
    """All groups in turn."""
    from tests.benchmarks.gpu.steps import Record

    asked.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    record = Record(asked.out / f"{about['date']}-{name}.json")
    record.begin(about)
    start = time.perf_counter()
    for group in asked.only:
        run_group(group, asked, record)
    print(f"{time.perf_counter() - start:.0f} s; {record.path}")
    failed = record.failed()
    for one in failed:
        print(f"FAILED {one}", file=sys.stderr)
    return int(bool(failed))


def run_group(group: str, asked: argparse.Namespace, record: Any) -> None:
    """One process, ended once all its steps must have; steps that it did not come to are recorded as failed."""
    from tests.benchmarks.gpu.groups import budgets

    names = budgets(group, asked.shape)
    limit = START + sum(names.values())
    try:
        code = subprocess.run(worker(group, asked, "--record", str(record.path)), timeout=limit).returncode
        why = f"its process ended with {code}"
    except subprocess.TimeoutExpired:
        why = f"its process was ended after {limit:.0f} s"
    done = record.of(group)
    for name, seconds in names.items():
        if name not in done:
            record.add(group, name, {"error": why, "may_take_s": seconds})


def work(group: str, asked: argparse.Namespace) -> int:
    """What a process does: the steps of a group, or to say what machine this is."""
    import torch

    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; to try the steps out: --device cpu --shape tiny", file=sys.stderr)
        return 2
    if group == "machine":
        print(json.dumps(about_machine(asked.device, asked.shape)))
        return 0
    from tests.benchmarks.gpu.groups import steps_of
    from tests.benchmarks.gpu.steps import Record, run_steps

    run_steps(group, steps_of(group, asked.shape, device), Record(asked.record), device)
    return 0


def about_machine(device: str, shape: str) -> dict[str, Any]:
    """Device, versions and the date."""
    import torch
    import transformers

    own = torch.device(device)
    found: dict[str, Any] = {"device": "cpu", "n_devices": 1}
    if own.type == "cuda":
        properties = torch.cuda.get_device_properties(own)
        found = {
            "device": properties.name,
            "n_devices": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "shape": shape, **found, **versions, "python": sys.version.split()[0]}


if __name__ == "__main__":
    sys.exit(main())
