"""Workers that are threads here: what they share, who does what, and what is found by those that come late."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hooks.batches import in_shared_parts
from hooks.errors import FrankenlensError
from hooks.shared import agreed, is_shared, shared, sharing
from interp.cluster.coordinator import MOST_LOST, Coordinator
from interp.cluster.stores import DistantStore
from interp.cluster.worker import Shares
from interp.results.store import Store, begun, opened, part, stores_opened


class Run:
    """A coordinator on a loop of its own, and workers that are threads."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.coordinator = self._made()

    def _made(self) -> Coordinator:
        async def make() -> Coordinator:
            return Coordinator()

        return asyncio.run_coroutine_threadsafe(make(), self.loop).result(10)

    def ask(self, method: str, *args: Any) -> Any:
        call = getattr(self.coordinator, method)(*args)
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(30)

    def work(self, name: str, do: Callable[[], Any]) -> Any:
        """The work of one worker, in this thread."""
        stores = stores_opened(lambda folder, about: DistantStore(folder, about, self.ask))
        with sharing(Shares(self.ask, name)), stores:
            return do()

    def together(self, do: Callable[[], Any], n: int = 2) -> list[Any]:
        """What each of several workers returns of the same work."""
        found: dict[int, Any] = {}
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: self.work(f"w{i}", do)}), daemon=True)
            for i in range(n)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return [found[i] for i in range(n)]

    def close(self) -> None:
        self.ask("close")
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def run() -> Iterator[Run]:
    one = Run()
    yield one
    one.close()


def _squares(done: list[int], n: int = 20) -> list[int]:
    def square(i: int) -> int:
        done.append(i)
        return i * i

    return [found for _, found in shared("squares", range(n), square)]


def test_alone_parts_are_done_in_turn_as_they_are_asked_for() -> None:
    done: list[int] = []
    every = shared("squares", iter(range(3)), lambda i: done.append(i) or i * i)
    assert next(every) == (0, 0) and done == [0]
    assert list(every) == [(1, 1), (2, 4)]
    assert agreed("one", lambda: 7) == 7


def test_each_part_is_done_once_and_all_have_the_same(run: Run) -> None:
    done: list[int] = []
    assert run.together(lambda: _squares(done), 4) == [[i * i for i in range(20)]] * 4
    assert sorted(done) == list(range(20))


def test_who_comes_late_finds_everything(run: Run) -> None:
    done: list[int] = []

    def twice() -> tuple[list[int], list[int]]:
        return _squares(done), _squares(done, 5)

    first = run.work("a", twice)
    assert run.work("b", twice) == first
    assert Counter(done) == Counter([*range(20), *range(5)])


def test_the_parts_of_a_worker_that_was_lost_are_done_by_another(run: Run) -> None:
    def lost() -> None:
        for _ in shared("steps", range(3), lambda i: _end() if i == 1 else i):
            pass

    def _end() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.work("a", lost)
    assert run.ask("lost", "a") == (True, "")
    done: list[int] = []
    assert run.work("b", lambda: list(shared("steps", range(3), lambda i: done.append(i) or i))) == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]
    assert done == [1, 2]  # part 0 was finished


def test_a_part_that_takes_too_many_along_is_named(run: Run) -> None:
    def dies() -> None:
        list(shared("steps", [[4, 5], [6]], lambda rows: 1 / 0 if 6 in rows else 0))

    told = []
    for i in range(MOST_LOST):
        with pytest.raises(ZeroDivisionError):
            run.work(f"w{i}", dies)
        told.append(run.ask("lost", f"w{i}"))
    assert told[:-1] == [(True, "")] * (MOST_LOST - 1)
    assert told[-1] == (True, "part 2 of 2 of 'steps' (6)")


def test_a_worker_without_a_part_loses_none(run: Run) -> None:
    assert run.ask("lost", "nobody") == (False, "")


def test_what_is_inside_a_part_is_done_there(run: Run) -> None:
    def outer(i: int) -> tuple[bool, list[int]]:
        return is_shared(), [found for _, found in shared("inner", range(3), lambda j: 10 * i + j)]

    found = run.together(lambda: list(shared("outer", range(4), outer)))
    assert found == [[(i, (False, [10 * i + j for j in range(3)])) for i in range(4)]] * 2
    assert run.ask("progress").total == 4


def test_the_split_of_the_first_holds_for_all(run: Run) -> None:
    """As of a worker with less memory."""

    def batches(size: int) -> list[list[int]]:
        return [list(rows) for rows, _ in in_shared_parts("batch", list(range(10)), size, list)]

    assert run.work("a", lambda: batches(4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert run.work("b", lambda: batches(3)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches(3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_workers_that_part_ways_share_nothing_wrong(run: Run) -> None:
    """The second call is of other rows in each."""
    first = run.work("a", lambda: [_squares([]), _squares([], 3)])
    second = run.work("b", lambda: [_squares([]), _squares([], 4)])
    assert first[1] == [0, 1, 4] and second[1] == [0, 1, 4, 9]


def test_parts_that_are_near_are_done_by_the_same(run: Run) -> None:
    by: dict[tuple[int, int], str] = {}
    both = threading.Barrier(2, timeout=20)

    def work() -> None:
        me = threading.current_thread().name

        def do(one: tuple[int, int]) -> int:
            if len(by) < 2:
                by[one] = me
                both.wait()  # each has one
            by[one] = me
            return 0

        list(
            shared("units", [(batch, k) for batch in range(2) for k in range(3)], do, near=lambda one: one[0])
        )

    run.together(work)
    assert {by[0, 0], by[1, 0]} == set(by.values()) and by[0, 0] != by[1, 0]


def test_a_store_is_the_coordinators_and_as_it_was_when_the_run_began(run: Run, tmp_path: Path) -> None:
    kept = Store(tmp_path, {"work": 1})
    kept.save("old", [1])
    computed: list[str] = []

    def work() -> tuple[Any, Any, Any, Any]:
        store = opened(tmp_path, {"work": 1})
        old = part(store, "old", lambda: computed.append("old") or [2])
        new = part(store, "new", lambda: computed.append("new") or {"x": np.arange(3.0)})
        new["x"] += 1  # what is read can be written to
        inside = [found for _, found in shared("inside", [0], lambda _: store.load("new")["x"].tolist())]
        return (
            old,
            new["x"].tolist(),
            inside,
            (store.load("new") is None, begun(store, "batch", 9, lambda n: "")),
        )

    found = run.work("a", work), run.work("b", work)
    assert found[0] == found[1] == ([1], [1, 2, 3], [[0, 1, 2]], (True, 0))
    assert computed == ["new", "new"]  # both go the same way, and the first is kept
    assert Store(tmp_path, {"work": 1}).load("new")["x"].tolist() == [0, 1, 2]
    with pytest.raises(FrankenlensError, match="another run"):
        run.work("c", lambda: opened(tmp_path, {"work": 2}))


def test_a_part_that_the_first_worker_kept_is_everyones(run: Run, tmp_path: Path) -> None:
    def work(value: int) -> int:
        return part(opened(tmp_path, {}), "batches", lambda: value)

    assert [run.work("a", lambda: work(3)), run.work("b", lambda: work(4))] == [3, 3]


def test_what_is_told_is_told_once(run: Run) -> None:
    for line in ("left out: a", "left out: a", "left out: b"):
        run.ask("tell", line)
    assert list(run.ask("progress").told) == ["left out: a", "left out: b"]
    assert list(run.ask("progress").told) == []
