"""Tensors that are too many for main memory: some of them there, the rest in a temporary file that nobody sees.

What a pair of 7B models gives its unembeddings along 1,000 traces of 2,000 tokens is 28 GB, and its weights 33. Both
are read part by part, so a file serves as well as memory; it is gone when nobody holds its tensors any more, killed
runs included.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import FrankenlensError
from hooks.memory import in_words

IN_MEMORY = 1 << 28
"""Bytes that a `Spill` keeps in main memory, if nothing else is said."""


class Spill:
    """Where many tensors are kept.

    Args:
        most: bytes that stay in main memory.
        what: they are, for the message where the disk is full.
    """

    def __init__(self, most: int | None = None, what: str = "the states of the soft metric's traces") -> None:
        self._what = what
        self._left = IN_MEMORY if most is None else most
        self._file: _File | None = None

    def keep(self, states: Float[Tensor, "row width"]) -> Tensor | Spilled:
        """A copy that nothing changes.

        Raises:
            FrankenlensError: there is no room for it on the disk.
        """
        copy = states.detach().to("cpu", copy=True).contiguous()
        self._left -= copy.nbytes
        if self._left >= 0 or not copy.nbytes:
            return copy
        own = self._file is not None and self._file.process == os.getpid()
        if self._file is None or not own:  # a fork would write over what its parent does
            self._file = _File(self._what)
        return self._file.keep(copy)


class Spilled:
    """States in a file [row width]; rows of it are read when they are asked for."""

    device = torch.device("cpu")

    def __init__(self, file: _File, start: int, like: Float[Tensor, "row width"]) -> None:
        self._file, self._start, self._n = file, start, len(like)
        self._width, self._dtype, self._row = like.shape[1], like.dtype, like.nbytes // len(like)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, rows: slice) -> Float[Tensor, "some width"]:
        first, end, step = rows.indices(self._n)
        if step != 1:
            raise ValueError("rows that follow one another are read")
        n = max(0, end - first)
        data = self._file.read(self._start + first * self._row, n * self._row)
        flat = torch.frombuffer(data, dtype=self._dtype) if n else torch.empty(0, dtype=self._dtype)
        return flat.view(n, self._width)

    def __reduce__(self) -> tuple:
        return _itself, (self[:],)


class _File:
    """Without a name, so that it goes with its last reader."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._file = tempfile.TemporaryFile(prefix="frankenlens-", buffering=0)  # noqa: SIM115
        self._end, self._alone, self.process = 0, threading.Lock(), os.getpid()
        weakref.finalize(self, self._file.close)

    def keep(self, states: Float[Tensor, "row width"]) -> Spilled:
        data, start, done = memoryview(states.view(torch.uint8).numpy().data).cast("B"), self._end, 0
        try:
            with self._alone:
                self._file.seek(start)
                while done < len(data):
                    done += self._file.write(data[done:]) or 0
        except OSError as error:
            raise FrankenlensError(
                f"{self._what} need more than the {in_words(start)} that the folder for temporary files holds "
                f"({error}); set TMPDIR to a folder with room, or ask for less at a time"
            ) from error
        self._end = start + len(data)
        return Spilled(self, start, states)

    def read(self, start: int, n: int) -> bytearray:
        data, done = bytearray(n), 0
        while done < n:
            found = self._some(start + done, memoryview(data)[done:])
            if not found:
                raise OSError("a temporary file is shorter than what was written to it")
            done += found
        return data

    def _some(self, start: int, into: memoryview) -> int:
        """A forked process has the file's own place in common with its parent, so none is set where it can be told."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into], start)
        with self._alone:
            self._file.seek(start)
            return self._file.readinto(into) or 0


def _itself(states: Tensor) -> Tensor:
    return states
