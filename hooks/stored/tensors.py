"""Where a tensor lies on disk, in one piece or in several, and its bytes read from any place on."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Shaped
from torch import Tensor

from hooks.errors import FrankenlensError

Piece: TypeAlias = tuple[Path, int, int]
"""File, first byte, bytes."""


@dataclass(frozen=True)
class Stored:
    """One tensor: pieces of files that follow one another, shape and type."""

    pieces: tuple[Piece, ...]
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

    def read(self) -> Shaped[Tensor, "..."]:
        """The tensor, whole.

        Raises:
            FrankenlensError: a file ends before it does.
        """
        found = torch.empty(self.shape, dtype=self.dtype)
        if found.numel():
            with Reader(self, ahead=True) as reader:
                reader.read(0, as_bytes(found))
        return found


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


def as_bytes(tensor: Shaped[Tensor, "..."]) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat).cast("B")


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor, in row-major order in a file.

    Attributes:
        offsets, sizes: which part, axis by axis.
        piece: where its bytes lie.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    piece: Piece


def joined(
    what: str, boxes: Sequence[Box], shape: Sequence[int], itemsize: int, files: str
) -> tuple[Piece, ...]:
    """Pieces of a tensor that is stored in parts, in the order of its own entries.

    Args:
        what: its name, for the message.
        boxes: the parts; equal ones (replicas) count once.
        shape: of the whole tensor.
        itemsize: bytes of an entry.
        files: where they lie, for the message.

    Raises:
        FrankenlensError: the parts overlap, leave something out, or reach beyond the tensor.
    """
    parts = {(box.offsets, box.sizes): box for box in reversed(boxes) if math.prod(box.sizes)}
    within = all(
        len(box.offsets) == len(box.sizes) == len(shape)
        and all(o >= 0 and o + n <= side for o, n, side in zip(box.offsets, box.sizes, shape, strict=True))
        for box in parts.values()
    )
    if not within or sum(math.prod(box.sizes) for box in parts.values()) != math.prod(shape):
        raise _not_whole(what, boxes, shape, files)
    cut = [axis for axis, side in enumerate(shape) if any(box.sizes[axis] != side for box in parts.values())]
    last = cut[-1] if cut else 0  # within the axes after it, every part is whole
    if not cut:
        return tuple(box.piece for box in parts.values())
    rows: dict[tuple[int, ...], list[tuple[int, int, Piece]]] = {}
    run = math.prod(shape[last + 1 :]) * itemsize
    for box in parts.values():
        path, start, _ = box.piece
        length = box.sizes[last] * run
        before = [range(o, o + n) for o, n in zip(box.offsets[:last], box.sizes[:last], strict=True)]
        for i, row in enumerate(product(*before)):
            rows.setdefault(row, []).append(
                (box.offsets[last], box.sizes[last], (path, start + i * length, length))
            )
    return tuple(_in_order(what, rows, boxes, shape, last, files))


def _in_order(
    what: str,
    rows: Mapping[tuple[int, ...], list[tuple[int, int, Piece]]],
    boxes: Sequence[Box],
    shape: Sequence[int],
    last: int,
    files: str,
) -> Iterator[Piece]:
    for row in sorted(rows):
        at = 0
        for offset, size, piece in sorted(rows[row]):
            if offset != at:
                raise _not_whole(what, boxes, shape, files)
            at += size
            yield piece
        if at != shape[last]:
            raise _not_whole(what, boxes, shape, files)


def _not_whole(what: str, boxes: Sequence[Box], shape: Sequence[int], files: str) -> FrankenlensError:
    parts = ", ".join(f"{list(box.sizes)} at {list(box.offsets)}" for box in boxes[:4])
    return FrankenlensError(
        f"{files}: the {len(boxes)} parts of {what} ({parts}) do not make {list(shape)}; a file of the checkpoint is "
        "missing, or is another run's: copy it again, whole."
    )
