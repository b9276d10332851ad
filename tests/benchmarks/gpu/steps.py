"""Steps that are timed, each with a time of its own; what one finds is on disk before the next begins."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch


class TimedOut(BaseException):
    """A step took longer than it may. No `Exception`: nothing that is measured may take it for an error of its own."""


@dataclass(frozen=True)
class Step:
    """Part of a run.

    Attributes:
        name: within its group.
        seconds: that it may take.
        run: what it does; gives what is recorded.
        needs: steps of its group that must have gone well.
    """

    name: str
    seconds: float
    run: Callable[[], Mapping[str, Any]]
    needs: tuple[str, ...] = ()


class Record:
    """What was found, in a JSON file that is whole at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """All of it."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    def begin(self, about: Mapping[str, Any]) -> None:
        """A new file, of a machine and no steps."""
        self._write({**about, "steps": {}})

    def add(self, group: str, name: str, found: Mapping[str, Any]) -> None:
        """One step's."""
        held = self.read()
        held["steps"].setdefault(group, {})[name] = dict(found)
        self._write(held)

    def of(self, group: str) -> dict[str, Any]:
        """The steps of a group so far."""
        return self.read()["steps"].get(group, {})

    def failed(self) -> list[str]:
        """Steps that did not go well, with their errors."""
        return [
            f"{group}: {name}: {found['error']}"
            for group, steps in self.read()["steps"].items()
            for name, found in steps.items()
            if "error" in found
        ]

    def _write(self, held: Mapping[str, Any]) -> None:
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def run_steps(group: str, steps: Sequence[Step], record: Record, device: torch.device) -> None:
    """All of them in turn. One that fails is recorded with its error, and only those that need it are left out."""
    for step in steps:
        done = record.of(group)
        lacking = [name for name in step.needs if "error" in done.get(name, {"error": ""})]
        start, peak = time.perf_counter(), Peak(device)
        if lacking:
            found: dict[str, Any] = {"error": f"not run: {', '.join(lacking)} did not go well"}
        else:
            found = _attempt(step)
        took = {"took_s": round(time.perf_counter() - start, 3), "may_take_s": step.seconds, **peak.found()}
        record.add(group, step.name, {**found, **took})
        print(f"{group}: {step.name}: {json.dumps(record.of(group)[step.name])}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _attempt(step: Step) -> dict[str, Any]:
    try:
        with at_most(step.seconds):
            return dict(step.run())
    except TimedOut:
        return {"error": f"took longer than its {step.seconds:g} s"}
    except Exception as error:
        where = traceback.format_exc().strip().splitlines()[-7:]
        return {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": where}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimedOut inside once the time is up; needs the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Peak:
    """Memory of a device from here on; nothing is known of a CPU's."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def found(self) -> dict[str, float]:
        """GiB: at most in all, and over what there was at first."""
        if self._device.type != "cuda":
            return {}
        most = torch.cuda.max_memory_allocated(self._device)
        return {
            "peak_gib": round(most / 2**30, 3),
            "peak_gained_gib": round((most - self._before) / 2**30, 3),
        }


def synchronized(device: torch.device) -> float:
    """The time, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(device: torch.device, run: Callable[[], Any]) -> float:
    """What a run takes, to its end on the device."""
    start = synchronized(device)
    run()
    return synchronized(device) - start
