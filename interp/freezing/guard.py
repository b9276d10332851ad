"""Frozen weights against whatever writes them outside an optimizer's step.

Schedule-free optimizers swap the weights in `.eval()` and `.train()`; averaging, look-ahead and merging write them too.
So frozen weights are looked at wherever they could be used: before their module runs, before they are saved, and after
an optimizer steps or swaps. Rows, whose values are kept, are put back; a whole tensor, of which only a fingerprint is
kept, is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from hooks import FrankenlensError
from interp.freezing.fingerprint import Fingerprint, bit_sum
from interp.freezing.refusals import sharded, written_message
from interp.freezing.rows import Rows

SWAPS = ("train", "eval")
"""Methods by which schedule-free optimizers change the weights between training and evaluation."""


@dataclass(frozen=True)
class _Mark:
    """How a whole tensor looked when its bits were last known to be right."""

    version: int
    place: int
    dtype: torch.dtype
    bits: int

    @classmethod
    def of(cls, parameter: Tensor) -> _Mark:
        return cls(parameter._version, parameter.data_ptr(), parameter.dtype, bit_sum(parameter))

    def is_of(self, parameter: Tensor) -> bool:
        """Whether nothing has announced a write (one through `.data` does not)."""
        now = parameter._version, parameter.data_ptr(), parameter.dtype
        return now == (self.version, self.place, self.dtype)


class Guard:
    """The frozen weights of a model, kept or refused.

    Args:
        parameters: name to parameter, of all that is frozen.
        rows: name to its frozen rows, None for all of it.
        before: name to the fingerprint of what is frozen whole.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: Mapping[str, Rows | None],
        before: Mapping[str, Fingerprint],
    ) -> None:
        self._parameters, self._rows, self._before = dict(parameters), dict(rows), dict(before)
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        whole = (name for name, own in self._rows.items() if own is None)
        self._marks = {name: _Mark.of(p) for name in whole if _is_here(p := self._parameters[name])}
        self._swapping: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def attach(self, model: nn.Module) -> list[Any]:
        """Look at frozen weights before a module that holds some runs or is saved; the handles of the hooks."""
        frozen = {id(p): name for name, p in self._parameters.items()}
        handles: list[Any] = []
        for module in model.modules():
            held = {own: frozen[id(p)] for own, p in module._parameters.items() if id(p) in frozen}
            if held:
                handles.append(module.register_forward_pre_hook(_Watch(self, held, saving=False)))
                handles.append(module.register_state_dict_pre_hook(_Watch(self, held, saving=True)))
        return handles

    def keep(self, names: Iterable[str], by: str, *, thoroughly: bool = True) -> None:
        """Put rows back, and make sure that whole tensors are as they were.

        Args:
            names: which parameters.
            by: what may have written them, for the message.
            thoroughly: read whole tensors; otherwise only where a write has announced itself.

        Raises:
            FrankenlensError: a whole tensor was written; the message names it.
        """
        for name in names:
            parameter, own = self._parameters[name], self._rows[name]
            if not _is_here(parameter) or tuple(parameter.shape) != self._shapes[name]:
                continue
            if own is not None:
                if not own.are_in(parameter):
                    own.put_back(parameter)
            elif thoroughly or not self._marks[name].is_of(parameter):
                self._require_as_it_was(name, parameter, by)

    def keep_held_by(self, optimizer: Optimizer, by: str) -> None:
        """`keep` all that an optimizer holds."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.keep([name for name, p in self._parameters.items() if id(p) in held], by)

    def _require_as_it_was(self, name: str, parameter: Tensor, by: str) -> None:
        now, seen = _Mark.of(parameter), self._marks[name]
        same = now.dtype == seen.dtype and now.bits == seen.bits
        if not same and not self._before[name].fits(parameter):
            raise FrankenlensError(written_message(name, by))
        self._marks[name] = now

    def is_at(self, module: nn.Module, own: str, name: str) -> bool:
        """Whether a module still holds the parameter itself; not after sharding, or in a copy."""
        return module._parameters.get(own) is self._parameters[name]

    def watch_swaps(self, optimizer: Optimizer) -> _Swaps | None:
        """Keep the weights after every swap of a schedule-free optimizer; None where it has none or is watched."""
        if optimizer in self._swapping or not all(callable(getattr(optimizer, one, None)) for one in SWAPS):
            return None
        self._swapping.add(optimizer)
        return _Swaps(self, optimizer)


class _Watch:
    """A hook of a module. A copy of the module, or one that is pickled, is free, as its weights are others."""

    def __init__(
        self, guard: Guard | None = None, held: Mapping[str, str] | None = None, *, saving: bool = False
    ) -> None:
        self._guard = None if guard is None else weakref.ref(guard)
        self._held, self._saving = dict(held or {}), saving

    def __call__(self, module: nn.Module, *_: Any) -> None:
        guard = None if self._guard is None else self._guard()
        if guard is None or torch.compiler.is_compiling():
            return
        names = [name for own, name in self._held.items() if guard.is_at(module, own, name)]
        thoroughly = self._saving or torch.is_grad_enabled()
        guard.keep(names, "something other than a step", thoroughly=thoroughly)

    def __deepcopy__(self, memo: Any) -> _Watch:
        return _Watch()

    def __reduce__(self) -> tuple[type[_Watch], tuple[()]]:
        return _Watch, ()


class _Swaps:
    """An optimizer whose swaps are followed by putting frozen weights back, until `remove`."""

    def __init__(self, guard: Guard, optimizer: Optimizer) -> None:
        self._guard, self._optimizer = weakref.ref(guard), weakref.ref(optimizer)
        self._on = True
        self._own = {name: vars(optimizer).get(name) for name in SWAPS}
        self._ours = {name: self._followed(name, getattr(optimizer, name)) for name in SWAPS}
        for name, followed in self._ours.items():
            setattr(optimizer, name, followed)

    def _followed(self, name: str, swap: Any) -> Any:
        def followed(*args: Any, **kwargs: Any) -> Any:
            found = swap(*args, **kwargs)
            guard, optimizer = self._guard(), self._optimizer()
            if self._on and guard is not None and optimizer is not None:
                guard.keep_held_by(optimizer, f"{type(optimizer).__name__}.{name}()")
            return found

        return followed

    def remove(self) -> None:
        """Give the optimizer its methods back; where another freezing follows them too, only do nothing any more."""
        self._on = False
        if (optimizer := self._optimizer()) is None:
            return
        for name, before in self._own.items():
            if vars(optimizer).get(name) is not self._ours[name]:
                continue
            if before is None:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, before)


def _is_here(parameter: Tensor) -> bool:
    return not parameter.is_meta and not sharded(parameter)
