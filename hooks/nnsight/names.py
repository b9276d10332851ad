"""Hook names as attributes inside an nnsight trace: `vlm.blocks[8].attn.hook_z`, read and write.

A read hands out a copy, so a saved value is never changed by a later edit; an edit in place of what was handed out
goes back into the model when the block moves on. Self-contained: nnsight ships this file with a remote trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nnsight.intervention.eproperty import WriteBack
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from hooks.anatomy import Slice
from hooks.errors import FrankenlensError, nearest


class AbsentHook(FrankenlensError, AttributeError):
    """No such hook point here; an AttributeError, so that `hasattr` is False."""


@dataclass(frozen=True)
class Place:
    """Where nnsight serves one hook point, and how its tensor is cut out of what is served there.

    Attributes:
        location: nnsight's name of the place.
        kind: a module's "input" (served as arguments and keywords), its "output", or the "tensor" itself.
        key, split, inplace, moved: see `hooks.points.HookPoint`.
        coefficient: what it is multiplied with before it is added to the stream, a number.
        owner: the interleaver of the model whose hook point it is, where more than one model may be traced.
    """

    location: str
    kind: str = "tensor"
    key: str | None = None
    split: Slice | None = None
    inplace: bool = False
    moved: bool = False
    coefficient: float = 1.0
    owner: Any = field(default=None, repr=False, compare=False)

    def pick(self, served: Any) -> Any:
        """The hook point's tensor."""
        own = self._own(served)
        return own if self.coefficient == 1.0 else own * self.coefficient

    def put(self, served: Any, new: Tensor) -> Any:
        """What is served, with the hook point's tensor replaced."""
        whole = self._whole(served)
        if new.shape != (shown := self.pick(served)).shape:
            raise FrankenlensError(
                f"{self.location}: {tuple(new.shape)} written, expected {tuple(shown.shape)}."
            )
        if self.coefficient != 1.0:  # as a difference: what is left alone stays what it was
            new = self._own(served) + (new - shown) / self.coefficient
        if self.moved:
            new = new.movedim(2, 0)
        new = new.to(whole.dtype) if self.split is None else self.split.into(whole, new.to(whole.dtype))
        if self.inplace:  # the residual branch holds the same tensor
            whole.copy_(new)
            return served
        if self.kind == "input":
            args, kwargs = served
            if self.key in kwargs:
                return args, {**kwargs, self.key: new}
            return (new, *args[1:]), kwargs
        if self.key is not None:
            setattr(served, self.key, new)
            return served
        return (new, *served[1:]) if isinstance(served, tuple) else new

    def _own(self, served: Any) -> Any:
        whole = self._whole(served)
        whole = whole.movedim(0, 2) if self.moved else whole
        return whole if self.split is None else self.split.of(whole)

    def _whole(self, served: Any) -> Any:
        if self.kind == "input":
            args, kwargs = served
            return kwargs[self.key] if self.key in kwargs else args[0]
        if self.kind == "output":
            if self.key is not None:
                return getattr(served, self.key)
            return served[0] if isinstance(served, tuple) else served
        return served


class Copies:
    """The copies of one served tensor that a block has been given, and which of them it has edited."""

    def __init__(self, place: Place, served: Any) -> None:
        self.place, self.served = place, served
        self.current = place.pick(served)
        self._edited = False
        self._given: list[tuple[Tensor, Any]] = []

    def give(self) -> Tensor:
        """A copy that holds all edits made so far."""
        self._settle()
        copy = self.current.clone()
        self._given = [(given, _stamp(given)) for given, _ in self._given] + [(copy, _stamp(copy))]
        return copy

    def commit(self) -> Any:
        """What goes back to the model: as it was served, unless a copy was edited."""
        self._settle()
        if self._edited:
            return self.place.put(self.served, self.current.clone())
        if self.current.requires_grad:  # what was read must lie on the path to the logits
            return self.place.put(self.served, self._given[-1][0].clone())
        return self.served

    def _settle(self) -> None:
        edited = [given for given, stamp in self._given if _changed(given, stamp)]
        if len(edited) > 1:
            raise FrankenlensError(
                f"{self.place.location} was read more than once and edited in place through two of the reads; read it "
                "once, edit that, or assign the whole value."
            )
        if edited:
            self.current, self._edited = edited[0], True


def _stamp(tensor: Tensor) -> Any:
    return tensor.clone() if tensor.is_inference() else tensor._version


def _changed(tensor: Tensor, stamp: Any) -> bool:
    if isinstance(stamp, Tensor):
        return not torch.allclose(tensor, stamp, rtol=0, atol=0, equal_nan=True)
    return tensor._version != stamp


def read(place: Place) -> Tensor:
    """The value at a place, once the model gets there. Call inside a trace."""
    mediator = Mediator.current(place.location)
    waiting: Any = mediator.transform
    key = (place, place.location, mediator.wanted(place.location))
    if waiting is not None and waiting.key == key:
        return waiting.view.give()
    copies = Copies(place, Mediator.value(place.location))
    mediator.transform = WriteBack(copies.commit, copies, *key)
    return copies.give()


def write(place: Place, value: Tensor) -> None:
    """Replace the value at a place. Call inside a trace."""
    if not isinstance(value, Tensor):
        raise FrankenlensError(f"{place.location}: a {type(value).__name__} written, expected a tensor.")
    if place.kind != "tensor":
        served = Mediator.value(place.location)
        return Mediator.swap(place.location, place.put(served, value.clone()))
    Mediator.swap(place.location, value.clone())


class Names:
    """A node of the tree of hook names; indexed where the names are, e.g. `blocks[8]`, `blocks[-1]`.

    Attributes of it that are hook points are read and assigned inside a trace.
    """

    _path: str
    _places: Mapping[str, Place | str]

    def __init__(self, path: str, places: Mapping[str, Place | str]) -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_places", places)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return get(self._child(name), self._places)

    def __setattr__(self, name: str, value: Any) -> None:
        put(self._child(name), value, self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._path}[{index}]: there are {len(self)}")
        return Names(self._child(str(index % len(self))), self._places)

    def __len__(self) -> int:
        return len([name for name in self._below(self._places) if name.isdigit()])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return [name for name in self._below(self._present()) if not name.isdigit()]

    def __repr__(self) -> str:
        return f"{self._path}: {', '.join(self._below(self._present()))}"

    def _child(self, name: str) -> str:
        return f"{self._path}.{name}"

    def _present(self) -> list[str]:
        return [name for name, place in self._places.items() if isinstance(place, Place)]

    def _below(self, names: Iterable[str]) -> list[str]:
        prefix = f"{self._path}."
        below = (n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix))
        return list(dict.fromkeys(below))


def get(path: str, places: Mapping[str, Place | str]) -> Any:
    """The hook point of a name, read now, or the node of the names below it.

    Raises:
        AbsentHook: there is none, with the reason.
    """
    if path in places:
        return read(_place(path, places))
    if any(name.startswith(f"{path}.") for name in places):
        return Names(path, places)
    raise AbsentHook(f"{path!r} is no hook point of this model. {nearest(path, places)}")


def put(path: str, value: Tensor, places: Mapping[str, Place | str]) -> None:
    """Write a hook point by name.

    Raises:
        AbsentHook: there is none, with the reason.
    """
    if path not in places:
        raise AbsentHook(f"{path!r} is no hook point of this model. {nearest(path, places)}")
    write(_place(path, places), value)


def _place(path: str, places: Mapping[str, Place | str]) -> Place:
    place = places[path]
    if isinstance(place, str):
        raise AbsentHook(f"{path} is absent here: {place}")
    try:
        running = Mediator.current(path).interleaver
    except ValueError:
        raise FrankenlensError(
            f"{path} has a value only while the model runs: read it inside `with vlm.trace(inputs):`."
        ) from None
    if place.owner is not None and running is not place.owner:
        raise FrankenlensError(
            f"{path} was asked of one model inside the trace of another. Open a trace of each, one after the other, in "
            "one `with vlm.session():`."
        )
    return place
