"""Ctrl-C put off while something is put on a model or taken off it, so that neither is ever done by half."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.utils.hooks import RemovableHandle


class Uninterrupted:
    """A context in which Ctrl-C is noted, and raised at its end; in threads other than the main one there is none.

    What undoes a change is called as `try: undo() except KeyboardInterrupt: undo(); raise`, and may run twice: Ctrl-C
    can still come before the context has begun.
    """

    def __enter__(self) -> "Uninterrupted":
        self._came, self._own = False, None
        if threading.current_thread() is threading.main_thread():
            own: Any = signal.getsignal(signal.SIGINT)
            if callable(own):
                self._own = own
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            signal.signal(signal.SIGINT, self._own)
            if self._came:
                self._own(signal.SIGINT, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True


@contextmanager
def registered(*registrations: Callable[[], RemovableHandle]) -> Iterator[None]:
    """PyTorch hooks on modules for the length of the context: functions that register one each."""
    handles: list[RemovableHandle] = []
    try:
        with Uninterrupted():
            for register in registrations:
                handles.append(register())
        yield
    finally:
        try:
            _remove(handles)
        except KeyboardInterrupt:
            _remove(handles)
            raise


def _remove(handles: list[RemovableHandle]) -> None:
    with Uninterrupted():
        for handle in handles:
            handle.remove()
