"""Run-time type checks of the tests: jaxtyping with beartype where a signature names an array, else beartype alone.

jaxtyping's import hook wraps every function so that array axes agree within each call. Nine of ten calls name no
array, and beartype alone checks those at a twentieth of the time.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_CHECKED: dict[Any, Callable[..., Any]] = {}
_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {}
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
    if fn.__closure__ is not None:
        return fn
    found = _checking(fn)
    _PLAIN[found] = fn
    return found


@contextmanager
def unchecked(*others: str) -> Iterator[None]:
    """The project without these type checks, as users run it; so are the names that modules of `others` imported."""
    packages = ("frankenlens", "hooks", "interp", "experiments", *others)
    modules = [
        one
        for name, one in list(sys.modules.items())
        if any(f"{name}.".startswith(f"{p}.") for p in packages)
    ]
    classes = {c for one in modules for c in vars(one).values() if inspect.isclass(c) and _is_of(c, packages)}
    replaced: list[tuple[Any, str, Any]] = []
    for space in (*modules, *classes):
        for name, value in list(vars(space).items()):
            plain = _unwrapped(value)
            if plain is not value:
                replaced.append((space, name, value))
                setattr(space, name, plain)
    jaxtyping.config.update("jaxtyping_disable", True)  # asked at each call
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        for space, name, value in replaced:
            setattr(space, name, value)


def _is_of(cls: type, packages: tuple[str, ...]) -> bool:
    return any(f"{cls.__module__}.".startswith(f"{package}.") for package in packages)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, classmethod | staticmethod):
        return type(value)(_PLAIN[value.__func__]) if value.__func__ in _PLAIN else value
    if isinstance(value, property) and value.fget is not None and value.fget in _PLAIN:
        return property(_PLAIN[value.fget], value.fset, value.fdel, value.__doc__)
    return _PLAIN.get(value, value) if inspect.isfunction(value) else value


def names_an_array(fn: Callable[..., Any]) -> bool:
    """Whether an annotation of a function has an array type in it; also where annotations cannot be resolved."""
    try:
        return "jaxtyping" in repr(get_type_hints(fn))
    except Exception:  # a name that only type checkers import: jaxtyping knows what to do
        return True
