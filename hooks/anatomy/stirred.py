"""A model read as if its gates and layer scales were other numbers, so that each can be told from all others.

Two scales may be equal by chance, a gate may be shut, or so small that its tanh is the gate, and a factor of exactly 1
is none. What a block multiplies by which of its parameters does not depend on their numbers: while the model is
watched, each of them reads as a number of its own. None is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hooks.anatomy.precise import forgotten

_LARGEST = 1e4  # what is larger is a bound, not a factor


class _Stirred(TorchFunctionMode):
    """Every function of PyTorch is given other tensors in the place of some."""

    def __init__(self, instead: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*self._read(args), **{name: self._read(one) for name, one in (kwargs or {}).items()})

    def _read(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._instead.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._read(one) for one in value)
        return value


def factors(block: nn.Module, path: str, width: int) -> Iterator[tuple[str, Tensor]]:
    """What may be a factor in a block, by path: parameters and buffers of one number, its own of one a channel."""
    for name, value in (*block.named_parameters(), *block.named_buffers()):
        alike = value.numel() == 1 or (value.numel() == width and "." not in name)
        if alike and value.is_floating_point() and not value.is_meta:
            yield f"{path}.{name}", value


@contextmanager
def stirred(model: nn.Module, blocks: Sequence[tuple[str, int]], precise: bool) -> Iterator[None]:
    """For the length of the context, what may be a factor in a block reads as another number.

    Args:
        model: the model.
        blocks: their paths, and the widths of their streams.
        precise: whether it computes in float32 meanwhile; otherwise the numbers are of its own precision.
    """
    generator = torch.Generator().manual_seed(0)
    instead: dict[int, Tensor] = {}
    kept: list[Tensor] = []
    for path, width in blocks:
        for _, value in factors(model.get_submodule(path), path, width):
            if id(value) not in instead and bool((value.detach().abs() < _LARGEST).all()):
                noise = 0.5 + torch.rand(value.shape, generator=generator).to(value.device)
                other = value.detach().float() + 0.1 * noise * (1 + value.detach().float().abs())
                instead[id(value)] = other if precise else other.to(value.dtype)
                kept.append(value)  # as long as it lives, no other tensor has its id
    with forgotten(model), _Stirred(instead):
        yield
