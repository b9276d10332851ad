"""What differs between two tensors, entry by entry, so kept that it turns either into the other in its own memory.

Of a piece of a tensor, the bits that differ (x XOR y) are kept at the places where any do. Written over the piece by
XOR, they make y of x, and x of y: one store serves both directions, exactly, whatever the numbers are (-0.0, NaN).
Reinforcement learning in bfloat16 leaves most entries as they were (2505.11711), so that this is far less than y.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from torch import Tensor

PIECE = 1 << 20
"""Entries that are turned at once: what turning takes beside the tensor is a few times their number, in bytes."""
ON_DEVICE = 16
"""As many pieces' entries at once on a device, where what costs is to begin."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of an entry to the whole numbers that have its bits."""


@dataclass(frozen=True)
class Everywhere:
    """Bits that differ in so many entries of a piece that to name these costs more."""

    bits: Int[Tensor, " entry"] | UInt8[Tensor, " entry"]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.bits.nbytes

    def turn(self, piece: Shaped[Tensor, " entry"]) -> None:
        """The one tensor into the other."""
        piece.bitwise_xor_(self.bits)


@dataclass(frozen=True)
class Here:
    """Bits that differ in some entries of a piece, named by one bit for each entry, or where they are few by place.

    Attributes:
        bits: of the entries that differ, in order.
        marks: eight entries a byte, the first of them its highest bit; None where there are places.
        places: of the entries that differ; None where there are marks.
    """

    bits: Int[Tensor, " changed"] | UInt8[Tensor, " changed"]
    marks: UInt8[Tensor, " eighth"] | None
    places: Int[Tensor, " changed"] | None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        named = self.places if self.marks is None else self.marks
        return self.bits.nbytes + (0 if named is None else named.nbytes)

    def turn(self, piece: Shaped[Tensor, " entry"]) -> None:
        """The one tensor into the other; all of it or, where something is raised, nothing."""
        if piece.device.type == "cpu":  # NumPy is four times as fast there
            own, at = piece.numpy(), self._at(len(piece)).numpy()
            own[at] ^= self.bits.numpy()
            return
        at = self._at(len(piece))
        piece.index_put_((at,), piece[at] ^ self.bits)

    def _at(self, n: int) -> Int[Tensor, " changed"]:
        if self.marks is None:
            assert self.places is not None
            return self.places.long()
        if self.marks.device.type == "cpu":
            return torch.from_numpy(np.flatnonzero(np.unpackbits(self.marks.numpy(), count=n)))
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.marks.device)
        bits = self.marks[:, None].bitwise_right_shift(shifts).bitwise_and_(1)
        return bits.view(-1)[:n].nonzero()[:, 0]


Change = Here | Everywhere


def as_bits(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, " entry"]:
    """The same memory, flat, as whole numbers."""
    return tensor.detach().view(-1).view(_BITS[tensor.element_size()])


class Comparing:
    """Compares pieces of one kind, in memory that it takes once: what is kept of them would else lie between what is
    let go, and the C library would give neither back.
    """

    def __init__(self, like: Shaped[Tensor, " entry"]) -> None:
        self._bits, self._differs = torch.empty_like(like), torch.empty_like(like, dtype=torch.bool)

    def __call__(self, one: Shaped[Tensor, " entry"], other: Shaped[Tensor, " entry"]) -> Change | None:
        """What differs between two pieces, of whole numbers, no longer than the first; None where nothing does.

        It is kept in the smallest of three ways: with n entries of b bytes of which k differ, n/8 + kb (marks),
        k(4 + b) (places) or nb bytes (everywhere).
        """
        n, size = len(one), one.element_size()
        bits = torch.bitwise_xor(one, other, out=self._bits[:n])
        differs = torch.ne(bits, 0, out=self._differs[:n])
        k = int(torch.count_nonzero(differs))
        if not k:
            return None
        marks, places = (n + 7) // 8, 4 * k
        if min(marks, places) + k * size >= n * size:
            return Everywhere(bits.clone())
        if places < marks:
            return Here(_chosen(bits, differs), None, differs.nonzero()[:, 0].to(torch.int32))
        return Here(_chosen(bits, differs), _packed(differs), None)


def change(one: Shaped[Tensor, " entry"], other: Shaped[Tensor, " entry"]) -> Change | None:
    """What differs between two flat tensors of whole numbers; see `Comparing`."""
    return Comparing(one)(one, other)


def _chosen(bits: Shaped[Tensor, " entry"], differs: Bool[Tensor, " entry"]) -> Shaped[Tensor, " changed"]:
    if bits.device.type != "cpu":
        return bits[differs]
    return torch.from_numpy(bits.numpy()[differs.numpy()])


def _packed(differs: Bool[Tensor, " entry"]) -> UInt8[Tensor, " eighth"]:
    return torch.from_numpy(np.packbits(differs.cpu().numpy())).to(differs.device)


def size_of(shares: float, entries: int, itemsize: int) -> int:
    """Bytes of the changes of a tensor, of whose entries a share differs, evenly."""
    changed = round(shares * entries)
    if not changed:
        return 0
    named = min((entries + 7) // 8, 4 * changed)
    return min(named + changed * itemsize, entries * itemsize)


def pieces_of(flat: Shaped[Tensor, " entry"]) -> Iterator[Shaped[Tensor, " piece"]]:
    """A flat tensor in the pieces that are turned at once."""
    size = piece_size(flat.device)
    for first in range(0, len(flat), size):
        yield flat[first : first + size]


def piece_size(device: torch.device) -> int:
    """Entries of a piece on a device."""
    return PIECE if device.type == "cpu" else ON_DEVICE * PIECE
