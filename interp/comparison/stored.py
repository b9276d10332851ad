"""Where a tensor lies on disk, in one piece or in several, and its bytes read from any place on."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from hooks.errors import FrankenlensError


def counted_in(*stored: torch.dtype) -> torch.dtype:
    """The type in which a value counts as unchanged: the coarsest of those it is stored in.

    float32 and wider are counted in bfloat16, in which such a checkpoint is run: as stored, hardly an entry that
    training touched is the same.
    """
    return torch.float16 if torch.float16 in stored and torch.bfloat16 not in stored else torch.bfloat16


@dataclass(frozen=True)
class Stored:
    """One tensor: pieces of files (file, first byte, bytes) that follow one another, shape and type."""

    pieces: tuple[tuple[Path, int, int], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int] | None:
        """Rows and columns of the linear map (a convolution's kernel is flattened to columns); None for a vector."""
        return (self.shape[0], math.prod(self.shape[1:])) if len(self.shape) > 1 else None


class Reader:
    """The bytes of a tensor by their place in it, wherever its pieces lie.

    Args:
        stored: the tensor.
        ahead: tell the system, where it can be told, that files are read from end to end.
    """

    def __init__(self, stored: Stored, ahead: bool = False) -> None:
        self._pieces, self._ahead = stored.pieces, ahead
        self._ends = list(accumulate(size for _, _, size in stored.pieces))
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, place: int, view: memoryview) -> None:
        """Fill a view with what stands from a place on.

        Raises:
            FrankenlensError: a file ends before that.
        """
        done = 0
        while done < len(view):
            piece = bisect_right(self._ends, place + done)
            path, start, size = self._pieces[piece]
            inside = place + done - (self._ends[piece] - size)
            file = self._file(path)
            file.seek(start + inside)
            n = file.readinto(view[done : done + min(len(view) - done, size - inside)])
            if not n:
                raise FrankenlensError(f"{path} ends before its last tensor does; download it again.")
            done += n

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = path.open("rb", buffering=0)
            if self._ahead and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._files[path].fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._files[path]
