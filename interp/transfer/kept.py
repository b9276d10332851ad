"""Values with tensors in them, as modules are given and give out: tuples, lists, mappings, outputs of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([mapped(one, change) for one in value])
    if isinstance(value, Mapping):
        return type(value)(**{name: mapped(one, change) for name, one in value.items()})
    return value


def blank(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Of the same shape, in no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


def copied(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A copy; of what `blank` made, itself."""
    return tensor.clone() if any(tensor.stride()) else tensor


def same(one: Any, other: Any) -> bool:
    """Bit for bit, but for what stands where there is no number."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(own, other[name]) for name, own in one.items())
    if isinstance(one, Sequence):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def n_bytes(value: Any) -> int:
    """Of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, Mapping):
        return sum(map(n_bytes, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(n_bytes, value))
    inside = getattr(value, "__dict__", {})  # of a layer of the cache
    return sum(n_bytes(one) for one in inside.values() if isinstance(one, Tensor))
