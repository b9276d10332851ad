"""One tensor of a stored checkpoint: where it lies, its shape and its type as safetensors names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from hooks.errors import FrankenlensError
from hooks.stored.tensors import Piece, Stored

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of safetensors that a checkpoint without quantization holds; whole numbers in counters alone."""
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


class Entry:
    """One tensor of a checkpoint.

    Args:
        pieces: files, first bytes and numbers of bytes that follow one another, or a function that looks them up when
            they are first asked for.
        shape: its shape.
        kind: its type, as safetensors names it.
        file: where it is said to be, in messages; by default the file of its first piece.
    """

    def __init__(
        self,
        pieces: tuple[Piece, ...] | Callable[[], tuple[Piece, ...]],
        shape: tuple[int, ...],
        kind: str,
        file: Path | None = None,
    ) -> None:
        self._given, self._file = pieces, file
        self.shape, self.kind = shape, kind

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Where its bytes lie."""
        return self._given() if callable(self._given) else self._given

    @property
    def file(self) -> Path:
        """Where it is."""
        return self.pieces[0][0] if self._file is None else self._file

    @property
    def size(self) -> int:
        """Bytes."""
        dtype = DTYPES.get(self.kind)
        if dtype is None:
            return sum(n for _, _, n in self.pieces)
        return Stored((), self.shape, dtype).entries * dtype.itemsize

    @property
    def stored(self) -> Stored:
        """As a tensor that can be read.

        Raises:
            FrankenlensError: its type is none that is read.
        """
        if self.kind not in DTYPES:
            raise FrankenlensError(f"{self.file}: a tensor of the type {self.kind}, which is not read.")
        return Stored(self.pieces, self.shape, DTYPES[self.kind])


def kind_of(dtype: torch.dtype) -> str:
    """A type as safetensors names it, or as PyTorch does where safetensors of a checkpoint have none."""
    return _KINDS.get(dtype) or str(dtype).removeprefix("torch.")
