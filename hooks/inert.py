"""Functions on a module that do not go with a copy of it."""

import copy
from collections.abc import Callable
from typing import Any


def nothing(*args: Any, **kwargs: Any) -> None:
    """What a copy of a hooked module has in the place of the hook."""


def _nothing() -> Callable[..., None]:
    return nothing


class Stays:
    """A hook function of one module; a copy of the module (deepcopy, pickle, torch.save) gets one that does nothing."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fn(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple:
        return _nothing, ()


def stays(shim: Any, original: Any) -> None:
    """Let copies of `shim` (an object that takes the place of another for a while) be copies of the original."""
    shim.__deepcopy__ = lambda memo: copy.deepcopy(original, memo)
    shim.__reduce_ex__ = original.__reduce_ex__
