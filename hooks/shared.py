"""The parts of a long work, done here, or by several processes that go the same way through it.

Processes that share a work all do it, step by step, each with models of its own. Only what is given to `shared` is done
once: each of its parts by one of them, and what came out is given to the others. Nothing but parts and what came out of
them goes from one to another, so that whatever a part needs (models, hooks, metrics) is never sent; and numbers do not
depend on how many there are, since the parts do not. A process that begins late, or again, finds what is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, runtime_checkable

Part = TypeVar("Part")
Found = TypeVar("Found")


@runtime_checkable
class Sharing(Protocol):
    """How a process and others that do the same work share its parts (`interp.cluster`)."""

    def share(
        self, what: str, parts: Sequence[Part], do: Callable[[Part], Found], near: Callable[[Part], Any]
    ) -> Iterator[tuple[Part, Found]]:
        """As `shared`."""
        ...


_SHARING: ContextVar[Sharing | None] = ContextVar("frankenlens_sharing", default=None)


@contextmanager
def sharing(one: Sharing | None) -> Iterator[None]:
    """What is `shared` inside is shared so; None: done here."""
    token = _SHARING.set(one)
    try:
        yield
    finally:
        _SHARING.reset(token)


def is_shared() -> bool:
    """Whether others do the same work. Not inside a part: that is done by one alone."""
    return _SHARING.get() is not None


def agreed(what: str, make: Callable[[], Found]) -> Found:
    """What is made once, by whichever of the processes comes first; as `shared`."""
    ((_, found),) = shared(what, [0], lambda _: make())
    return found


def shared(
    what: str,
    parts: Iterable[Part],
    do: Callable[[Part], Found],
    near: Callable[[Part], Any] = lambda part: None,
) -> Iterator[tuple[Part, Found]]:
    """Every part in turn, and what came of it; done here, or by whichever process takes it first.

    Processes that share must come here alike, with the same calls in the same order, and the parts must not depend on
    one another. Where they differ in how they split a work (one has less memory, say), the split of the first holds.

    Args:
        what: is done, for the progress bar and for errors.
        parts: numbers, texts, and lists of these; that can be sent.
        do: makes something of a part, that can be sent, and changes nothing else; may itself share, which is then
            done here.
        near: parts that have the same are better done by the same process, in turn.
    """
    now = _SHARING.get()
    if now is None:
        yield from ((part, do(part)) for part in parts)
        return

    def alone(part: Part) -> Found:
        with sharing(None):
            return do(part)

    yield from now.share(what, list(parts), alone, near)
