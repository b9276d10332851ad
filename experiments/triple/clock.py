"""CPU seconds of a stage, added up over interruptions."""

from __future__ import annotations

import json
import time
from pathlib import Path

from interp.results.whole import write_whole


class CpuClock:
    """Counts this process's CPU time from now on, on top of what `path` says was spent before.

    CPU time, not wall time: on a shared machine only the first is the same from run to run.
    """

    def __init__(self, path: Path, limit: float = float("inf"), every: float = 20.0) -> None:
        """Starts the clock.

        Args:
            path: JSON file that keeps the seconds.
            limit: the budget in seconds that `tick` compares with.
            every: wall seconds between writes.
        """
        self.path, self.limit, self.every = path, limit, every
        self._before = json.loads(path.read_text())["cpu_seconds"] if path.exists() else 0.0
        self._start, self._written = time.process_time(), 0.0

    @property
    def seconds(self) -> float:
        """CPU seconds so far."""
        return self._before + time.process_time() - self._start

    def tick(self) -> float:
        """Writes the time now and then; returns the fraction of the budget that is spent."""
        if time.monotonic() - self._written > self.every:
            self.write()
        return self.seconds / self.limit

    def write(self) -> None:
        """Writes the time, atomically."""
        self._written = time.monotonic()
        write_whole(self.path, (json.dumps({"cpu_seconds": round(self.seconds, 1)}) + "\n").encode())
