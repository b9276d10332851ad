"""Towers: stacks of modules through which a stream runs, found by the shapes that go in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hooks.anatomy.watching import Attended, Call, Record


@dataclass(frozen=True)
class Stack:
    """A stack of blocks that was seen to run: the paths of its lists, and the first call of each block, in order."""

    lists: tuple[str, ...]
    calls: tuple[Call, ...]

    @property
    def started(self) -> int:
        """When its first block started."""
        return self.calls[0].started

    def holds(self, path: str) -> bool:
        """Whether a module is in one of its lists."""
        return any(path.startswith(f"{own}.") for own in self.lists)

    def within(self, path: str) -> bool:
        """Whether it is in a module, or is one."""
        return all(f"{own}.".startswith(f"{path}.") for own in self.lists)

    def touches(self, path: str) -> bool:
        """Whether one of its lists is in a module."""
        return any(own.startswith(f"{path}.") for own in self.lists)


def in_one_stream(found: Sequence[Stack], streams: Mapping[str, tuple[Tensor, Tensor]]) -> list[Stack]:
    """Stacks of which one goes on where another stops are one (dense layers before those of experts; Idefics's layers
    that look at images between those that do not).

    Args:
        found: the stacks.
        streams: what went into each block and came out, by path.
    """
    links: dict[frozenset[int], list[bool]] = {}
    for pair, before, after in _changes(found):
        made, given = streams[before][1], streams[after][0]
        same = made.shape == given.shape and made.device == given.device
        links.setdefault(pair, []).append(same and bool(torch.equal(made, given)))
    one = {place: {place} for place in range(len(found))}
    for pair, same in links.items():
        if all(same):
            both = set().union(*(one[place] for place in pair))
            one.update(dict.fromkeys(both, both))
    groups = {id(group): sorted(group) for group in one.values()}
    return sorted((_joined([found[i] for i in group]) for group in groups.values()), key=lambda s: s.started)


def ends(found: Sequence[Stack]) -> set[str]:
    """The blocks behind which, or before which, one of another stack runs."""
    return {path for _, *paths in _changes(found) for path in paths}


def _changes(found: Sequence[Stack]) -> Iterator[tuple[frozenset[int], str, str]]:
    """Where a block of one stack follows one of another: the two stacks' places and the two blocks' paths."""
    owner = {call.path: place for place, stack in enumerate(found) for call in stack.calls}
    order = sorted((call for stack in found for call in stack.calls), key=lambda call: call.started)
    for before, after in pairwise(order):
        pair = frozenset((owner[before.path], owner[after.path]))
        if len(pair) == 2:
            yield pair, before.path, after.path


def _joined(some: Sequence[Stack]) -> Stack:
    calls = sorted((call for stack in some for call in stack.calls), key=lambda call: call.started)
    return Stack(tuple(path for stack in some for path in stack.lists), tuple(calls))


def stacks(model: nn.Module, record: Record) -> list[Stack]:
    """The outermost lists of modules that were called and returned a stream of the shape that they were given.

    Sorted by when they started. The decoder is the last one.
    """
    first: dict[str, Call] = {}
    for call in record.calls:
        first.setdefault(call.path, call)
    attending = {id(one.module) for one in record.attended}
    found: list[Stack] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        if any(stack.holds(path) for stack in found):
            continue
        calls = [first[name] for i in range(len(module)) if (name := f"{path}.{i}") in first]
        calls = [call for call in calls if call.ended >= 0]
        if calls and all(_keeps_shape(call) for call in calls) and _is_stack(module, calls, attending):
            found.append(Stack((path,), tuple(sorted(calls, key=lambda call: call.started))))
    return sorted(found, key=lambda stack: stack.started)


def _keeps_shape(call: Call) -> bool:
    return call.given is not None and any(out.shape == call.given.shape for out in call.made.values())


def _is_stack(module: nn.ModuleList | nn.Sequential, calls: list[Call], attending: set[int]) -> bool:
    members = [module[int(call.path.rpartition(".")[2])] for call in calls]
    if any(sum(1 for part in member.modules() if is_linear(part)) < 2 for member in members):
        return False
    if len(members) >= 2:
        return True
    return isinstance(module, nn.ModuleList) and any(id(part) in attending for part in members[0].modules())


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by one matrix of its own: a linear layer, GPT-2's Conv1D, a quantized or wrapped one."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or weight is None:
        return hasattr(module, "base_layer") or (
            hasattr(module, "in_features") and hasattr(module, "out_features")
        )
    return getattr(weight, "ndim", 0) == 2 and not isinstance(module, nn.modules.conv._ConvNd)


def attended_within(record: Record, call: Call) -> list[Attended]:
    """The attention calls between start and end of a module's call."""
    return [one for one in record.attended if call.started < one.time < call.ended]
