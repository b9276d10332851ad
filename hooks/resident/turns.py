"""Two models in the memory of one: whichever is in use has its numbers there, and the other is read through a store.

The two are modules of their own, and hooks, anatomy and configuration are each one's own; what they share is the memory
of their weights. A weight in which they differ (`hooks.resident.changes`) holds the first one's numbers at rest. While
the second is in use (`hooks.exclusive`: a run, a generation, hooks, a graft), it holds the second one's, and what the
first has in its place is an `Away`, as the second has at rest. So whoever reads a weight reads the right numbers,
whatever the moment; being in use is what makes it fast.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from hooks.errors import FrankenlensError
from hooks.exclusive import Exclusive, Hold, exclusive_of, share
from hooks.resident.away import Away
from hooks.resident.changes import Change, as_bits, pieces_of
from hooks.uninterrupted import Uninterrupted

Side = Literal["first", "second"]
AT_ONCE = 1 << 25
"""Bytes of memory that are turned while Ctrl-C waits: some hundredths of a second."""
SIDES: tuple[Side, Side] = ("first", "second")


@dataclass(eq=False)
class Piece:
    """A part of a tensor's memory, what differs there, and whose numbers it holds."""

    memory: Shaped[Tensor, " entry"]
    change: Change
    holds: Side = "first"

    def turn(self) -> None:
        """To the other's numbers; what raises leaves it as it was. Ctrl-C is put off by the caller."""
        self.change.turn(self.memory)
        self.holds = _other(self.holds)


@dataclass(eq=False)
class Turned:
    """One weight in which the two models differ.

    Attributes:
        name: in the first model's state dict.
        shared: its memory.
        pieces: those of them in which anything differs.
        own: each model's parameter.
        places: where each model has it (more than one place if it is tied): module and name.
    """

    name: str
    shared: Tensor
    pieces: list[Piece]
    own: Mapping[Side, nn.Parameter]
    places: Mapping[Side, Sequence[tuple[weakref.ref[nn.Module], str]]]
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._version: dict[Side, int] = {}
        self._away = {side: Away(self.shared, partial(self.read, side)) for side in SIDES}

    @torch.no_grad()
    def read(self, side: Side) -> Shaped[Tensor, "..."]:
        """A copy of one model's numbers, whoever's the memory holds."""
        with self.lock:
            made = self.shared.clone()
            flat, start = as_bits(made), self.shared.storage_offset()
            for piece in self.pieces:
                if piece.holds != side:
                    first = piece.memory.storage_offset() - start
                    piece.change.turn(flat[first : first + len(piece.memory)])
            return made

    def leave(self, side: Side) -> None:
        """A model no longer has the memory: an `Away` stands in every place; unless a graft stands there already."""
        own = self.own[side]
        if not own.data.is_set_to(self.shared):
            return
        self._put(side, own, self._away[side])
        own.data = self.shared.new_empty(
            0
        )  # whoever kept the parameter reads nothing, rather than the other's
        self._version[side] = own._version
        torch.autograd.graph.increment_version(own)  # no gradient is taken through what it was

    def come(self, side: Side) -> None:
        """A model has the memory again."""
        own = self.own[side]
        if own.numel() != self.shared.numel():
            own.data = self.shared
            _set_version(own, self._version[side])  # it is, bit for bit, what it was
        self._put(side, self._away[side], own)

    def _put(self, side: Side, old: Tensor, new: Tensor) -> None:
        for module, name in self.places[side]:
            if (held := module()) is not None and held._parameters.get(name) is old:
                held._parameters[name] = new  # type: ignore[assignment]


class Turns:
    """Two models that take turns in one memory.

    Attributes:
        switches: how often the memory was turned, to and fro.

    Arguments:
        first: the model whose numbers are in memory.
        second: a model whose every parameter has the memory of the first's of that name.
        changes: name to what differs in each piece (`pieces_of`); names of one tensor once.
    """

    def __init__(
        self, first: nn.Module, second: nn.Module, changes: Mapping[str, Sequence[Change | None]]
    ) -> None:
        self.switches, self._ended = 0, False
        self._side: Side | None = "first"  # None while it is on the way
        self.sides: dict[Hold, Side] = {}
        models: dict[Side, nn.Module] = {"first": first, "second": second}
        places = {side: _places(model) for side, model in models.items()}
        own = {side: dict(model.named_parameters()) for side, model in models.items()}
        self._shared = [(name, one) for side in SIDES for name, one in own[side].items()]
        self.tensors = [
            Turned(
                name,
                own["first"][name].data,  # which counts its versions apart: each model's graphs are its own
                list(_pieces(own["first"][name], some)),
                {side: own[side][name] for side in SIDES},
                {side: places[side][id(own[side][name])] for side in SIDES},
            )
            for name, some in changes.items()
            if any(one is not None for one in some)
        ]
        self._portions = list(_portions(self.tensors))
        for one in self.tensors:
            one.leave("second")
        self._versions = [one._version for _, one in self._shared]
        uses = exclusive_of(first)
        self._uses, self._first = uses, weakref.ref(first)
        share(first, _Seat(uses, self, "first"))
        share(second, _Seat(uses, self, "second"))

    @property
    def nbytes(self) -> int:
        """Bytes that the second model takes beside the first."""
        return sum(piece.change.nbytes for one in self.tensors for piece in one.pieces)

    @property
    def moved(self) -> int:
        """Bytes that are read and written to turn the memory once: what differs, and the pieces in which it does."""
        return self.nbytes + sum(2 * piece.memory.nbytes for one in self.tensors for piece in one.pieces)

    @torch.no_grad()
    def to(self, side: Side) -> None:
        """Turn the memory to one model. Where it is broken off, whatever is read is right, and it may be called again.

        Raises:
            FrankenlensError: somebody wrote to a weight that both models have.
        """
        if side == self._side or self._ended:
            return
        written = self._written()
        if self._side == "first" and written:
            raise FrankenlensError(
                f"{written[0]} was written to (by an optimizer?), and its memory is the other model's of the pair too: "
                "open two models to train one of them."
            )
        self._side = None
        self.switches += 1
        try:
            with Uninterrupted():
                for one in self.tensors:
                    one.leave(_other(side))
            for some in self._portions:
                with Uninterrupted():
                    for one, piece in some:
                        if piece.holds != side:
                            with one.lock:
                                piece.turn()
            with Uninterrupted():
                for one in self.tensors:
                    one.come(side)
        finally:
            self._versions = [one._version for _, one in self._shared]
        self._side = side
        if written:
            raise FrankenlensError(
                f"{written[0]} of the pair's second model was written to while it was in memory, and so was the first "
                "one's: open the pair again, as two models to train one of them."
            )

    def end(self) -> None:
        """The memory is the first model's from now on; the second is read through what differs."""
        self.to("first")
        self._ended = True
        if (first := self._first()) is not None:
            share(first, self._uses)

    def settle(self, uses: Exclusive) -> None:
        """Turn the memory to whoever is in use, the innermost; at rest to the first."""
        top = uses.innermost
        self.to("first" if top is None else self.sides.get(top, "first"))

    def _written(self) -> list[str]:
        now = zip(self._shared, self._versions, strict=True)
        return [name for (name, one), version in now if one._version != version]


class _Seat(Exclusive):
    """The uses of one of the two models: they are uses of both, and the innermost says whose numbers are in memory."""

    shares_memory = True

    def __init__(self, uses: Exclusive, turns: Turns, side: Side) -> None:
        self._uses, self._turns = uses, turns
        self._side: Side = side

    def renew(self) -> None:
        self._uses.renew()

    def take(self, hold: Hold) -> None:
        self._uses.take(hold)
        self._turns.sides[hold] = self._side
        self._turns.settle(self._uses)

    def drop(self, hold: Hold) -> None:
        with Uninterrupted():
            self._uses.drop(hold)
            self._turns.sides.pop(hold, None)
            self._turns.settle(self._uses)

    def drop_dead(self) -> None:
        with Uninterrupted():
            self._uses.drop_dead()
            self._turns.settle(self._uses)

    def until_on_top(self, hold: Hold) -> None:
        self._uses.until_on_top(hold)


def _set_version(tensor: Tensor, version: int) -> None:
    """Let autograd take a tensor for what it was at a version: PyTorch has no public call for it (FSDP uses this)."""
    autograd = getattr(torch._C, "_autograd", None)
    if (act := getattr(autograd, "_unsafe_set_version_counter", None)) is not None:
        act((tensor,), (version,))


def _other(side: Side) -> Side:
    return "second" if side == "first" else "first"


def _places(model: nn.Module) -> dict[int, list[tuple[weakref.ref[nn.Module], str]]]:
    """Identity of a parameter to all its places."""
    found: dict[int, list[tuple[weakref.ref[nn.Module], str]]] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                found.setdefault(id(value), []).append((weakref.ref(module), name))
    return found


def _portions(tensors: Sequence[Turned]) -> Iterator[list[tuple[Turned, Piece]]]:
    """All pieces, so many together as Ctrl-C may wait for."""
    some: list[tuple[Turned, Piece]] = []
    size = 0
    for one in tensors:
        for piece in one.pieces:
            some.append((one, piece))
            size += piece.memory.nbytes
            if size >= AT_ONCE:
                yield some
                some, size = [], 0
    if some:
        yield some


def _pieces(parameter: nn.Parameter, changes: Sequence[Change | None]) -> Iterator[Piece]:
    memory = pieces_of(as_bits(parameter.data))
    yield from (Piece(some, one) for some, one in zip(memory, changes, strict=True) if one is not None)
