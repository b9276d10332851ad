"""Other forwards of a model's modules for a while; the model has its own again afterwards, whatever happens inside."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from hooks.uninterrupted import Uninterrupted

Forward = Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]
"""What a module does instead: given its own forward, and the arguments of the call."""


@contextmanager
def replaced(model: nn.Module, forwards: Mapping[str, Forward], once: bool = False) -> Iterator[None]:
    """Other forwards, by path of their module, inside the context.

    What stands on a module (PyTorch's hooks) sees what the other forward gives out.

    Args:
        model: the model; none of the modules may have a forward of its own (`hooks.anatomy.structure`).
        forwards: what the modules do.
        once: from their second call on they do what they did before.
    """
    modules = {path: model.get_submodule(path) for path in forwards}
    try:
        with Uninterrupted():
            for path, module in modules.items():
                vars(module)["forward"] = _instead(module, forwards[path], once)
        yield
    finally:
        try:
            _put_back(list(modules.values()))
        except KeyboardInterrupt:
            _put_back(list(modules.values()))
            raise


def _instead(module: nn.Module, act: Forward, once: bool) -> Callable[..., Any]:
    own = module.forward

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if once:
            vars(module).pop("forward", None)
        return act(own, args, kwargs)

    return forward


def _put_back(modules: list[nn.Module]) -> None:
    with Uninterrupted():
        for module in modules:
            vars(module).pop("forward", None)
