"""A half-precision model run with every operation in float32, to see what it computes without its rounding.

In bfloat16 a factor of 0.998 and one of 1 are the same number, and a sum is right to two digits: little about a block
can be proved by its numbers. What a block adds to its stream does not depend on the precision that it is added in, so
the model is watched in float32: its weights are taken as they are, each widened for the one operation that reads it,
and none is written. What is found is then held against the model's own numbers (`hooks.selfcheck`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hooks.anatomy.nouns import Anatomy

HALVES = frozenset({torch.bfloat16, torch.float16})
_MOVES: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name) for name in ("__getitem__", "view", "reshape", "transpose", "permute", "t")),
        *(getattr(Tensor, name) for name in ("unsqueeze", "squeeze", "expand", "chunk", "split", "unbind")),
        *(getattr(Tensor, name) for name in ("narrow", "select", "index_select", "flatten", "unflatten")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "data_ptr")),
        *(
            getattr(Tensor, name)
            for name in ("is_floating_point", "element_size", "detach", "requires_grad_")
        ),
        *(
            torch.transpose,
            torch.permute,
            torch.t,
            torch.chunk,
            torch.split,
            torch.unbind,
            torch.index_select,
        ),
        *(functional.embedding, torch.is_floating_point, torch.is_tensor, torch.numel),
    }
)
"""Nothing is computed here: the numbers that come out are widened, not the whole matrix that they are taken from."""
_NARROWING: Mapping[Any, Any] = {Tensor.half: Tensor.float, Tensor.bfloat16: Tensor.float}
_UNKNOWN = (RuntimeError, TypeError, ValueError)  # what a kernel raises that knows no float32


class Precision(TorchFunctionMode):
    """While it is on, every function of PyTorch is given half-precision tensors in float32, and asked for float32.

    A kernel that knows no float32 (flash attention) runs in the model's own precision, as the model runs it.

    Args:
        half: the model's own precision; None where that is float32.
        on: False changes nothing.

    Attributes:
        eps: rounding step of the coarsest precision that something was computed in.
    """

    def __init__(self, half: torch.dtype | None, on: bool = True) -> None:
        super().__init__()
        self._half = half if on else None
        self.eps = torch.finfo(torch.float32 if on or half is None else half).eps

    @property
    def acts(self) -> bool:
        """Whether anything is computed otherwise than the model does it."""
        return self._half is not None

    def given(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A model's inputs, in the precision that it computes in meanwhile."""
        return widened(dict(inputs)) if self.acts else dict(inputs)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # an attribute; a dtype is said to be what it will be
            out = func(*args, **kwargs)
            return out if isinstance(out, Tensor) else widened(out)
        if func in _MOVES or _writes_half(func, args):
            return widened(func(*args, **kwargs))
        try:
            return widened(_NARROWING.get(func, func)(*widened(args), **widened(kwargs)))
        except torch.OutOfMemoryError:  # says nothing about the kernel
            raise
        except _UNKNOWN as error:
            return self._in_its_own(func, args, kwargs, error)

    def _in_its_own(self, func: Any, args: tuple, kwargs: dict, error: Exception) -> Any:
        assert self._half is not None
        try:
            out = func(*_narrowed(args, self._half), **_narrowed(kwargs, self._half))
        except _UNKNOWN:
            raise error from None
        self.eps = torch.finfo(self._half).eps
        return widened(out)


def runs_in_float32(anatomy: Anatomy) -> bool:
    """Whether the model that this is of was watched in float32."""
    return "float32" not in anatomy.absent


def half_of(model: nn.Module) -> torch.dtype | None:
    """The half precision that a model has weights in; None where it has none."""
    return next((value.dtype for value in model.parameters() if value.dtype in HALVES), None)


def eps_of(*tensors: Tensor) -> float:
    """The rounding step of the coarsest precision among tensors, float32 at the finest."""
    return max(torch.finfo(torch.float32).eps, *(torch.finfo(one.dtype).eps for one in tensors))


def within_rounding(error: Float[Tensor, "*lead d"], size: Float[Tensor, "*lead d"], eps: float) -> bool:
    """Whether every entry is as near as rounding leaves it that was done inside, where the entries of a row are mixed.

    Args:
        error: the difference.
        size: of what was summed at each entry.
        eps: the rounding step; half precisions accumulate in float32, which accumulates in itself.
    """
    steps = 64 if eps <= torch.finfo(torch.float32).eps else 4
    return bool((error.abs() <= steps * eps * (size + size.mean(-1, keepdim=True))).all())


def widened(value: Any) -> Any:
    """Half-precision tensors and dtypes as float32, inside lists, tuples and dictionaries too."""
    return _mapped(value, HALVES, torch.float32)


def _narrowed(value: Any, half: torch.dtype) -> Any:
    return _mapped(value, frozenset({torch.float32}), half)


def _mapped(value: Any, old: frozenset[torch.dtype], new: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype in old else value
    if isinstance(value, torch.dtype):
        return new if value in old else value
    if type(value) in (list, tuple):
        return type(value)(_mapped(one, old, new) for one in value)
    if type(value) is dict:
        return {key: _mapped(one, old, new) for key, one in value.items()}
    return value


def _writes_half(func: Callable, args: tuple) -> bool:
    """Whether a function writes into a half-precision tensor, which a widened copy of it would not be."""
    name = getattr(func, "__name__", "")
    inplace = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return inplace and bool(args) and isinstance(args[0], Tensor) and args[0].dtype in HALVES


@contextmanager
def in_float32(model: nn.Module, on: bool = True) -> Iterator[Precision]:
    """For the length of the context a half-precision model computes in float32; one in float32 as ever.

    Args:
        model: the model.
        on: False leaves it in its own precision.
    """
    precision = Precision(half_of(model), on)
    if not precision.acts:
        yield precision
        return
    with forgotten(model), precision:
        yield precision


@contextmanager
def forgotten(model: nn.Module) -> Iterator[None]:
    """What modules note down about themselves during the context is forgotten behind it."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held))
        for module in model.modules()
        for held in (module.__dict__, module._parameters, module._buffers)
    ]
    try:
        yield
    finally:
        for held, own in before:
            held.clear()
            held.update(own)
