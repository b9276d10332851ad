"""One user of a model at a time: a second thread waits for the first, a second task of one thread is refused."""

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hooks.errors import FrankenlensError
from hooks.uninterrupted import Uninterrupted

PATIENCE = 60.0
"""Seconds that a thread waits for a model on which another one keeps something without running it."""


@dataclass(eq=False)
class Hold:
    """One use of a model: what for, in which thread and task, and the use inside which it began.

    Where it keeps something on the model for what runs inside, rather than run it itself, nobody waits for it for ever.
    """

    what: str
    runs: bool = False
    thread: threading.Thread = field(default_factory=threading.current_thread)
    task: Any = field(default_factory=lambda: _task())
    within: "Hold | None" = field(default_factory=lambda: _INSIDE.get())
    broken: bool = False


class _Inside:
    """The innermost use in this context; a thread that `asyncio.to_thread` begins has that of its task.

    It stays in its process: nnsight sends this along with a block that runs elsewhere.
    """

    def __init__(self) -> None:
        self._hold: ContextVar[Hold | None] = ContextVar("frankenlens_inside", default=None)

    def get(self) -> Hold | None:
        """It, or None."""
        return self._hold.get()

    def set(self, hold: Hold | None) -> None:
        """From now on, in this context."""
        self._hold.set(hold)

    def __reduce__(self) -> tuple:
        return _Inside, ()


_INSIDE = _Inside()


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


class Exclusive:
    """The uses of one model, the outermost first; all of one thread and of one task.

    Attributes:
        shares_memory: whether the model's weights lie in memory that holds another's too (`hooks.resident`).
    """

    shares_memory = False

    def __init__(self) -> None:
        self._holds: list[Hold] = []
        self._used = time.monotonic()
        self.renew()

    def renew(self) -> None:
        """In a process that was forked, nobody wakes those who wait."""
        self._changed = threading.Condition()

    @property
    def innermost(self) -> Hold | None:
        """The use that was begun last; None where there is none."""
        return self._holds[-1] if self._holds else None

    def take(self, hold: Hold) -> None:
        """Begin a use, when no other thread has one.

        Raises:
            FrankenlensError: another task of this thread has one; another thread, that will not end it; or weights were
                put back in another order than they were put in, and the context of some is still open.
        """
        with self._changed:
            while self._holds and self._holds[-1].thread is not hold.thread:
                self._require_waiting_helps(hold)
                self._changed.wait(0.2)
            top = self._holds[-1] if self._holds else None
            if top is not None and top.task not in (None, hold.task):
                raise FrankenlensError(
                    f"another task of this thread is in {top.what} of this model and would act on what this one runs: "
                    "await it first, or open the model once more from its files for each task."
                )
            if any(one.broken for one in self._holds):
                raise FrankenlensError(
                    "weights were put back into this model while others, put in later, were still in: leave those "
                    "contexts first; what they were for is not what would run now."
                )
            with Uninterrupted():
                self._holds.append(hold)
                self._used = time.monotonic()
                _INSIDE.set(hold)

    def drop(self, hold: Hold) -> None:
        """End a use; once more changes nothing."""
        with Uninterrupted(), self._changed:
            if hold in self._holds:
                self._holds.remove(hold)
                if _INSIDE.get() is hold:
                    _INSIDE.set(hold.within)
                self._used = time.monotonic()
                self._changed.notify_all()

    def drop_dead(self) -> None:
        """End the uses of threads that have ended themselves."""
        for hold in list(self._holds):
            if not hold.thread.is_alive():
                self.drop(hold)

    def until_on_top(self, hold: Hold) -> None:
        """Wait until no other thread runs inside a use, for the thread that ends it."""
        own = threading.current_thread()
        with self._changed:
            while (
                hold in self._holds
                and self._holds[-1].thread is not own
                and self._holds[-1].thread.is_alive()
            ):
                if not self._changed.wait(0.2) and time.monotonic() - self._used > PATIENCE:
                    return

    def _require_waiting_helps(self, hold: Hold) -> None:
        top = self._holds[-1]
        if not top.thread.is_alive():
            why = f"the thread {top.thread.name!r} has ended without closing it: close it, or vlm.close()"
        elif self._begun_inside(hold):
            why = "this thread was begun inside of it, and it may wait for this thread: run the model there"
        elif not top.runs and time.monotonic() - self._used > PATIENCE:
            why = f"the thread {top.thread.name!r} has kept it for {PATIENCE:.0f} s without running the model"
        else:
            return
        raise FrankenlensError(
            f"another thread is in {top.what} of this model; {why}, or open the model once more from its files."
        )

    def _begun_inside(self, hold: Hold) -> bool:
        outer = hold.within
        while outer is not None and outer not in self._holds:
            outer = outer.within
        return outer is not None


class _OfModels:
    """One for each model. They stay in their process: nnsight sends this along with a block that runs elsewhere."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[nn.Module, Exclusive] = weakref.WeakKeyDictionary()
        self.renew()

    def renew(self) -> None:
        """In a process that was forked, whatever other threads held is held by nobody."""
        self._new = threading.RLock()  # a generator that is dropped meanwhile may end a use
        for one in list(self._of.values()):
            one.renew()

    def of(self, model: nn.Module) -> Exclusive:
        """That of a model."""
        with self._new:
            return self._of.setdefault(model, Exclusive())

    def put(self, model: nn.Module, uses: Exclusive) -> None:
        """Those of a model from now on."""
        with self._new:
            self._of[model] = uses

    def __reduce__(self) -> tuple:
        return _OfModels, ()


_MODELS = _OfModels()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_MODELS.renew)


def exclusive_of(model: nn.Module) -> Exclusive:
    """The uses of a model, whoever opened it how often."""
    return _MODELS.of(model)


def share(model: nn.Module, uses: Exclusive) -> None:
    """From now on, uses of a model are kept there: models that share memory are used one at a time."""
    _MODELS.put(model, uses)


@contextmanager
def exclusively(model: nn.Module, what: str) -> Iterator[None]:
    """No other thread or task runs the model through an opened model meanwhile, or changes what stands on it.

    Args:
        model: the model; contexts nest.
        what: is done with it, for the message of a refusal.

    Raises:
        FrankenlensError: as `Exclusive.take`.
    """
    uses, hold = exclusive_of(model), Hold(what, runs=True)
    try:
        uses.take(hold)
        yield
    finally:
        try:
            uses.drop(hold)
        except KeyboardInterrupt:
            uses.drop(hold)
            raise


def require_same_thread(hold: Hold) -> None:
    """After a context was left and all was put back: refuse that it was left in another thread than it was entered in.

    Raises:
        FrankenlensError: it was.
    """
    if threading.current_thread() is not hold.thread:
        raise FrankenlensError(
            f"{hold.what} was begun in the thread {hold.thread.name!r} and closed in another; the model is as it was "
            "before. Enter and leave a context in one thread."
        )
