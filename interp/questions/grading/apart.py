"""Symbolic mathematics in a process of its own, which is ended where it comes to no end.

An alarm is heard between two steps of Python, and one step may be a power that takes years, or all memory. The
operating system ends a process in the middle of a step; the next question has a new one. It holds sympy and
math-verify, and no model.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from interp.questions.grading.symbols import Unparsed

BEGINNING = 120.0
"""Seconds that the process may take to begin."""
MEMORY = 4 << 30
"""Bytes of the process, at most."""

_SERVE = """
import json, sys, types
about = json.loads(sys.stdin.readline())
sys.path[:] = about["path"]
for name, place in about["packages"]:  # without their faces, which import the models' libraries
    package = types.ModuleType(name)
    package.__path__ = [place]
    sys.modules[name] = package
from interp.questions.grading.apart import serve
serve(about["memory"])
"""
_PACKAGES = ("interp", "interp.questions", "interp.questions.grading")


def equal_expressions(found: Sequence[str], wanted: Sequence[str], timeout: int) -> bool | None:
    """As `interp.questions.grading.symbols.equal_expressions`, in another process and from any thread.

    Raises:
        Unparsed: as there; or it took a second longer than `timeout`, longer than `within` allows, or all of `MEMORY`.
    """
    asked, left = {"found": list(found), "wanted": list(wanted), "timeout": timeout}, _LEFT.get()
    with _LOCK:
        worker, begun = _worker(), time.monotonic()
        seconds = timeout + 1.0 if left is None else min(timeout + 1.0, left[0])
        if seconds <= 0:
            raise Unparsed("all that is to be worked out takes too long")
        try:
            return worker.ask(asked, seconds)
        finally:
            if left is not None:
                left[0] -= time.monotonic() - begun


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """All questions that are asked inside, together, take so long at most, once the process has begun."""
    before = _LEFT.set([seconds])
    try:
        yield
    finally:
        _LEFT.reset(before)


_LEFT: ContextVar[list[float] | None] = ContextVar("frankenlens_left", default=None)


class _Worker:
    """The process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self._said,), daemon=True).start()
        here = Path(__file__).parent
        places = [str(here.parents[1]), str(here.parent), str(here)]
        about = {"path": sys.path, "packages": list(zip(_PACKAGES, places, strict=True)), "memory": MEMORY}
        self.ask(about, BEGINNING)

    def _listen(self, said: queue.SimpleQueue[str]) -> None:
        with suppress(ValueError, OSError):
            for line in self._process.stdout or ():
                said.put(line)
        said.put("")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, what: Any, seconds: float) -> Any:
        """Its answer; without one in time, it is ended.

        Raises:
            Unparsed: it says why there is none, or was ended.
        """
        told = False
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._said.get(timeout=seconds)
            answer = json.loads(line) if line else {"unparsed": "the process that worked it out has ended"}
            told = bool(line) and not answer.get("last")
        except queue.Empty:
            raise Unparsed(f"it was not worked out within {seconds:.1f} s") from None
        except OSError as error:
            raise Unparsed(f"the process that works it out does not run: {error}") from error
        finally:
            if not told:  # Ctrl-C, too: the answer to this would be taken for that to the next
                self.end()
        if "unparsed" in answer:
            raise Unparsed(answer["unparsed"])
        return answer["equal"]

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError, ValueError, AttributeError):
                pipe.close()  # type: ignore[union-attr]


_LOCK = threading.Lock()
_KEPT: list[_Worker] = []


def _worker() -> _Worker:
    if not _KEPT or not _KEPT[0].is_alive:
        _end()
        try:
            _KEPT.append(_Worker())
        except OSError as error:
            raise Unparsed(f"no process can be begun to work it out: {error}") from error
    return _KEPT[0]


@atexit.register
def _end() -> None:
    while _KEPT:
        _KEPT.pop().end()


def _forget() -> None:
    """A process that was forked has none of its own yet, and leaves its parent's alone."""
    global _LOCK
    _LOCK = threading.Lock()
    _PARENTS.extend(_KEPT)
    _KEPT.clear()


_PARENTS: list[_Worker] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def serve(memory: int) -> None:
    """Answer questions until there are no more, or one took all memory; in the process."""
    from interp.questions.grading import symbols

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    symbols.equal_expressions(["x + 1"], ["1 + x"], int(BEGINNING))  # imports, whose time is no question's
    _limit(memory)
    answer: dict[str, Any] = {"equal": None}
    while not answer.get("last"):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        answer = _answer(symbols.equal_expressions, **json.loads(line))
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _answer(
    equal: Callable[..., bool | None], found: list[str], wanted: list[str], timeout: int
) -> dict[str, Any]:
    _limit(seconds=timeout)
    try:
        return {"equal": equal(found, wanted, timeout)}
    except Unparsed as error:
        spent = isinstance(error.__cause__, (MemoryError, OSError))
        return {"unparsed": str(error), "last": spent}
    except Exception as error:
        return {"unparsed": f"it failed: {type(error).__name__}: {error}", "last": True}


def _limit(memory: int | None = None, seconds: int | None = None) -> None:
    """Memory, or time of the processor: who asked may be gone, and ends nothing any more."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with suppress(OSError, ValueError):
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if seconds is not None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            until = int(used.ru_utime + used.ru_stime) + 2 * seconds + 5
            resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
