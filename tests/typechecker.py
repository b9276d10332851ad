"""Run-time type checks of the tests: jaxtyping with beartype where a signature names an array, else beartype alone.

jaxtyping's import hook wraps every function so that array axes agree within each call. Nine of ten calls name no
array, and beartype alone checks those at a twentieth of the time.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_CHECKED: dict[Any, Callable[..., Any]] = {}
_jaxtyped = jaxtyping.jaxtyped
_checking: Any = beartype(conf=BeartypeConf(violation_type=TypeError))  # as jaxtyping's own errors are


def install() -> None:
    """What jaxtyping's import hook decorates with, from here on."""
    jaxtyping.jaxtyped = jaxtyped


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


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped` for the import hook, which passes functions and classes.

    A closure that names no array stays as it is: beartype would take longer over its definition than over its calls.
    """
    if fn is None:
        return lambda given: jaxtyped(given, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)
        return fn
    if not inspect.isfunction(fn) or names_an_array(fn):
        return _jaxtyped(fn, typechecker=typechecker)
    return fn if fn.__closure__ is not None else _checking(fn)


def names_an_array(fn: Callable[..., Any]) -> bool:
    """Whether an annotation of a function has an array type in it; also where annotations cannot be resolved."""
    try:
        return "jaxtyping" in repr(get_type_hints(fn))
    except Exception:  # a name that only type checkers import: jaxtyping knows what to do
        return True
