"""What stands for a weight while its memory holds another model's: a tensor that is read through what differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils._pytree import tree_map

from hooks.errors import FrankenlensError

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""Operations that give the same numbers and need not read them."""


class Away(torch.Tensor):
    """A parameter without memory of its own; any operation on it is done on a copy that is made for it.

    Shape, type and device cost nothing. It is not written to, and no gradient goes to it.
    """

    _read: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Shaped[Tensor, "*shape"], read: Callable[[], Tensor]) -> Away:
        """One that looks like a tensor, and is read by a function."""
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, requires_grad=False
        )
        made._read = read
        made._is_param = True  # what makes a tensor a Parameter, says nn.Parameter
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SAME:
            own = args[0]
            return Away(own, own._read)
        named = zip(func._schema.arguments, args, strict=False)
        if any(_is_written(one) and isinstance(value, Away) for one, value in named):
            raise FrankenlensError(
                "this weight was written to while the other model of the pair is in memory: a pair with one model in "
                "memory is read, and changed by grafts; open two models to write to them."
            )
        return func(*tree_map(here, args), **tree_map(here, kwargs or {}))

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = torch.nn.Parameter(self._read(), requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise FrankenlensError(
            "this weight's memory holds the other model of the pair: save a model inside "
            'vlm.exclusive("saving"), or a copy of it.'
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Away({tuple(self.shape)}, {self.dtype}, {self.device})"


def here(value: Any) -> Any:
    """A tensor with memory of its own in place of one that is away; anything else as it is."""
    return value._read() if isinstance(value, Away) else value


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
