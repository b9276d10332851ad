"""beartype, once for each signature; jaxtyping's import hook asks for it anew whenever a closure is defined."""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_CHECKED: dict[Any, Callable[..., Any]] = {}


def checked(stub: Callable[..., Any]) -> Callable[..., Any]:
    """A stub of jaxtyping's (a function's signature, and a body that returns at most its argument) under beartype.

    Stubs of one function of one module, with the same code and annotations, check the same. Annotations are compared
    as they print, since `Float[Tensor, "a"]` is a new class each time it is written.
    """
    optional = len(stub.__defaults__ or ()), frozenset(stub.__kwdefaults__ or ())
    key = (stub.__module__, stub.__qualname__, stub.__code__, repr(stub.__annotations__), optional)
    if key not in _CHECKED:
        _CHECKED[key] = beartype(stub)
    return _CHECKED[key]
