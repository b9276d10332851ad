"""Weights put into a model for a while. Its own are set aside, and are there again afterwards, bit for bit."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from hooks.errors import FrankenlensError
from hooks.exclusive import Hold, exclusive_of, require_same_thread
from hooks.spilled import Spill
from hooks.uninterrupted import Uninterrupted


@dataclass(eq=False)
class _Swap:
    """What stood in a model's tensors before."""

    hold: Hold
    own: list[tuple[Tensor, Tensor | Aside]] = field(default_factory=list)

    def put_back(self) -> None:
        for target, data in reversed(self.own):
            if isinstance(data, Aside):
                data.put_back(target)
            else:
                target.data = data


class Aside:
    """What stood in one tensor, kept where it takes no memory beside the model (`hooks.spilled`)."""

    def __init__(self, target: Shaped[Tensor, "*shape"], spill: Spill) -> None:
        self._kept = spill.keep(_rows(target.data))

    def put_back(self, target: Shaped[Tensor, "*shape"]) -> None:
        """The same bits into the same memory, a few rows at a time."""
        rows = _rows(target.data)
        some = max(1, PART // max(1, rows[:1].nbytes))
        for first in range(0, len(rows), some):
            rows[first : first + some].copy_(self._kept[first : first + some])
        if rows.data_ptr() != target.data_ptr():  # not contiguous: those were a copy's
            target.data.copy_(rows.view(target.shape))


def _rows(data: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "row width"]:
    return data.reshape(len(data) if data.ndim else 1, math.prod(data.shape[1:]))


PART = 1 << 26
"""Bytes that are put back at once."""


_OPEN: weakref.WeakKeyDictionary[nn.Module, list[_Swap]] = weakref.WeakKeyDictionary()


@contextmanager
def swapped(
    model: nn.Module,
    values: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    what: str,
    spill: Spill | None = None,
) -> Iterator[None]:
    """Other numbers in a model's parameters and buffers, inside the context; its own tensors, bit for bit, after it.

    Whatever is written to the model inside is gone afterwards, where it was written to a tensor that was swapped.
    Contexts nest, and are left in the reverse order.

    Args:
        model: the model.
        values: a parameter or buffer of the model, and what is to be in it, which nobody else writes to (`like` makes
            such a tensor); drawn one by one, each put in before the next.
        what: "a graft", say, for the message of a refusal.
        spill: where the model's own numbers are kept, where there is no memory for them beside the others: these are
            then written into the model's own memory, and its own back into it, and values may not be of that memory.

    Raises:
        FrankenlensError: the disk has no room for them; another task or thread uses the model (`hooks.exclusive`).
            After all was put back: the context is left in another order, or in another thread, than it was entered.
    """
    swap, uses, broken_off = _Swap(Hold(what)), exclusive_of(model), True
    try:
        if spill is not None and uses.shares_memory:
            raise FrankenlensError(
                f"there is no memory for {what} beside the model, and the model's own holds the other one of its pair "
                "too: free some, or open two models, whose memory can be written to."
            )
        uses.take(swap.hold)
        with Uninterrupted():
            _OPEN.setdefault(model, []).append(swap)
        for target, value in values():
            if spill is not None:
                own = Aside(target, spill)
                with Uninterrupted(), torch.no_grad():
                    swap.own.append((target, own))
                    target.data.copy_(value)
                continue
            with Uninterrupted():
                swap.own.append((target, target.data))
                target.data = value
        yield
        broken_off = False
    finally:
        inner: list[_Swap] = []
        try:
            _close(model, swap, inner)
        except KeyboardInterrupt:
            _close(model, swap, inner)
            raise
        require_same_thread(swap.hold)
        # Where something else is raised (Ctrl-C may come while an inner context is left), that is what is said.
        if not broken_off and (inner or swap.hold.broken):
            which = "before one that was begun inside of it" if inner else "after the one around it"
            raise FrankenlensError(
                f"{what} was closed {which}; the model has its own weights again. Leave contexts in the reverse "
                "order, as nested `with` blocks do."
            )


def _close(model: nn.Module, swap: _Swap, inner: list[_Swap]) -> None:
    """Put back what a swap replaced, and what was put in after it; once more changes nothing."""
    uses = exclusive_of(model)
    uses.until_on_top(swap.hold)
    with Uninterrupted():
        stack = _OPEN.get(model, [])
        if swap in stack:
            at = stack.index(swap)
            inner += stack[at + 1 :]
            for one in reversed(stack[at:]):
                one.put_back()
            for one in inner:
                one.hold.broken = True
            del stack[at:]
        uses.drop(swap.hold)


def abandon(model: nn.Module) -> None:
    """Put back what threads put in that have ended, and whatever was put in after it; end all that they held."""
    dead = [swap for swap in _OPEN.get(model, []) if not swap.hold.thread.is_alive()]
    if dead:
        _close(model, dead[0], [])
    exclusive_of(model).drop_dead()


def like(source: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A copy whose memory is the source's own until one of the two is written to (copy on write), where PyTorch can.

    A whole donor grafted into a recipient of 7B parameters would else be a third model in memory, since nobody may
    write to the donor and the recipient's own weights are set aside. PyTorch has no public call for it: its storages
    do it, and the one way in from Python is private. It is tried on a small tensor first, once a device; where it is
    gone or does not do this any more, the copy is an ordinary one, which differs in nothing but memory.
    """
    data = source.detach()
    if not _copies_on_write(data.device):
        return data.clone()
    try:
        return _lazy(data)
    except RuntimeError:  # memory that PyTorch did not allocate: mapped from a file, shared between processes
        return data.clone()


@cache
def _copies_on_write(device: torch.device) -> bool:
    """Whether of two such copies, one for writing to either side, neither reaches the other."""
    try:
        for writes_to_source in (True, False):
            source = torch.zeros(4, device=device)
            made = _lazy(source)
            written, other = (source, made) if writes_to_source else (made, source)
            written[1:].add_(1)
            if other.tolist() != [0.0] * 4 or written.tolist() != [0.0, 1.0, 1.0, 1.0]:
                return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _lazy(data: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    return torch._lazy_clone(data)  # type: ignore[attr-defined]
