"""Towers: stacks of modules through which a stream runs, found by the shapes that go in and out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hooks.anatomy.watching import Attended, Call, Record


@dataclass(frozen=True)
class Stack:
    """A stack of blocks that was seen to run: its list's path, and the first call of each block, in order."""

    path: str
    calls: tuple[Call, ...]

    @property
    def started(self) -> int:
        """When its first block started."""
        return self.calls[0].started


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
        if any(path.startswith(f"{stack.path}.") for stack in found):
            continue
        calls = [first[name] for i in range(len(module)) if (name := f"{path}.{i}") in first]
        calls = [call for call in calls if call.ended >= 0]
        if calls and all(_keeps_shape(call) for call in calls) and _is_stack(module, calls, attending):
            found.append(Stack(path, tuple(sorted(calls, key=lambda call: call.started))))
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
