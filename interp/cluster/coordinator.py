"""Who does which part, what came of it, and what is kept: the one process that all workers of a run speak to."""

from __future__ import annotations

import asyncio
import pickle
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from interp.results.lock import locked
from interp.results.store import Store

MOST_LOST = 3
"""Workers that one part may take down with it."""


@dataclass
class Call:
    """One call of `hooks.shared.shared`, the same in all workers.

    Attributes:
        what: it is called.
        parts: as they were sent, and by part what it is called, and what it is near to.
        todo: parts that nobody does.
        doing: part to who does it.
        found: part to what came of it, as it was sent.
    """

    what: str
    parts: bytes
    names: Sequence[str]
    near: Sequence[str]
    todo: list[int]
    doing: dict[int, str] = field(default_factory=dict)
    found: dict[int, bytes] = field(default_factory=dict)

    def next_for(self, last: str | None) -> int:
        """The part to do next: near to the last one, else near to what fewest are at, else the first."""
        at = Counter(self.near[number] for number in self.doing)
        return min(self.todo, key=lambda number: (self.near[number] != last, at[self.near[number]], number))


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        what: is being done.
        done, total: parts of all calls so far.
        computed: parts that were done, those done again among them.
        told: lines that workers wrote, each once.
    """

    what: str
    done: int
    total: int
    computed: int
    told: Sequence[str]


class Coordinator:
    """Ray runs one of these for a run, on the machine of who started it, where `out` is.

    Every method but the constructor is called by workers or the driver, from afar. What has arrays in it is sent as
    bytes: Ray would give back arrays that cannot be written to.
    """

    def __init__(self) -> None:
        self._calls: dict[str, Call] = {}
        self._last: dict[str, tuple[str, str]] = {}  # of a worker: call and nearness
        self._lost: Counter[tuple[str, int]] = Counter()
        self._computed = 0
        self._what = "opening the models"
        self._told: deque[str] = deque()
        self._known: set[str] = set()
        self._changed = asyncio.Condition()
        self._stores: dict[str, Store] = {}
        self._new: set[tuple[str, str]] = set()  # parts that this run keeps
        self._agreed: dict[str, bytes] = {}
        self._held = ExitStack()

    async def agree(self, name: str, value: bytes) -> bytes:
        """What the first who asked has."""
        return self._agreed.setdefault(name, value)

    async def begin(
        self, key: str, what: str, parts: bytes, names: Sequence[str], near: Sequence[str]
    ) -> bytes:
        """The parts of a call, as the first who came to it split it."""
        if key not in self._calls:
            self._calls[key] = Call(what, parts, names, near, list(range(len(names))))
        self._what = what
        return self._calls[key].parts

    async def take(self, key: str, worker: str) -> int | None:
        """A part for this worker, as soon as there is one; None: all are finished."""
        call = self._calls[key]
        async with self._changed:
            await self._changed.wait_for(lambda: call.todo or len(call.found) == len(call.names))
            if not call.todo:
                return None
            last = self._last.get(worker)
            number = call.next_for(last[1] if last and last[0] == key else None)
            call.todo.remove(number)
            call.doing[number] = worker
            self._last[worker] = key, call.near[number]
            return number

    async def finish(self, key: str, number: int, worker: str, found: bytes) -> None:
        """Keep what came of a part."""
        call = self._calls[key]
        self._computed += 1
        async with self._changed:
            call.found.setdefault(number, found)
            if call.doing.get(number) == worker:
                del call.doing[number]
            if number in call.todo:  # of a worker that was taken for dead
                call.todo.remove(number)
            self._changed.notify_all()

    async def found(self, key: str, number: int) -> bytes:
        """What came of a part."""
        return self._calls[key].found[number]

    async def lost(self, worker: str) -> tuple[bool, str]:
        """Give the parts of a dead worker to others; whether it had any, and the one that has taken too many along."""
        too_often, had = "", False
        async with self._changed:
            for key, call in self._calls.items():
                for number in [n for n, who in call.doing.items() if who == worker]:
                    had = True
                    del call.doing[number]
                    self._lost[key, number] += 1
                    if self._lost[key, number] < MOST_LOST:
                        call.todo.append(number)
                    else:  # nobody else is to try
                        too_often = (
                            f"part {number + 1} of {len(call.names)} of {call.what!r} ({call.names[number]})"
                        )
            self._changed.notify_all()
        return had, too_often

    async def tell(self, line: str) -> None:
        """Something for who started the run to read, once."""
        if line not in self._known:
            self._known.add(line)
            self._told.append(line)

    async def close(self) -> None:
        """Let go of the folders."""
        self._held.close()

    async def progress(self) -> Progress:
        """How far the run is; what is told is told once."""
        told = [self._told.popleft() for _ in range(len(self._told))]
        done = sum(len(call.found) for call in self._calls.values())
        total = sum(len(call.names) for call in self._calls.values())
        return Progress(self._what, done, total, self._computed, told)

    async def store(self, folder: str, about: Mapping[str, Any]) -> None:
        """Open a store, once for all workers, and let nobody else write there while the run goes on.

        Raises:
            FrankenlensError: as `Store`, and of its lock.
        """
        with self._telling():
            if folder not in self._stores:
                self._held.enter_context(locked(folder))
                self._stores[folder] = Store(folder, about)
            elif not self._stores[folder].is_of(about):
                Store(folder, about)  # refuses

    async def load(self, folder: str, name: str, of: str, all_of_it: bool) -> bytes:
        """A part of a store as it was when the run began, or (`all_of_it`) is now.

        What a run keeps itself it does not find: a worker that comes late goes the same way through the work as the
        others, past the same calls.

        Raises:
            FrankenlensError: as `Store.load`.
        """
        if not all_of_it and (folder, name) in self._new:
            return pickle.dumps(None)
        with self._telling():
            return pickle.dumps(self._stores[folder].load(name, of))

    async def sizes(self, folder: str, name: str, all_of_it: bool) -> list[int]:
        """`Store.sizes`; see `load`."""
        found = self._stores[folder].sizes(name)
        return [n for n in found if all_of_it or (folder, f"{name}-{n}") not in self._new]

    async def holds(self, folder: str, name: str, of: str, all_of_it: bool) -> bool:
        """`Store.holds`; see `load`."""
        return (all_of_it or (folder, name) not in self._new) and self._stores[folder].holds(name, of)

    async def keep(self, folder: str, name: str, value: bytes, of: str) -> bytes:
        """Keep a part; what is kept, which is what the first who had it gave.

        Raises:
            FrankenlensError: as `Store.save`.
        """
        if (folder, name) not in self._new:
            with self._telling():
                self._stores[folder].save(name, pickle.loads(value), of)
            self._new.add((folder, name))
            return value
        return pickle.dumps(self._stores[folder].load(name, of))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Warnings of a store are for who started the run."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield
        self._told.extend(f"warning: {one.message}" for one in found)
