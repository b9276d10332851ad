"""What decides how a model computes, but for its weights' numbers: two models with the same structure have one anatomy.

An IN checkpoint and what RL made of it, or the same model opened again, are watched once; the second is proved on its
own weights (`hooks.opening`).
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, torch.dtype)  # None may be the place of what a run leaves behind
_OF_A_FILE = ("name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of a configuration that say where it came from, or what the weights say themselves."""
_NO_PART = frozenset({*vars(nn.Module()), *_OF_A_FILE, "_is_hf_initialized"})


def structure_of(model: nn.Module, inputs: Mapping[str, Any], image: bool) -> Hashable | None:
    """A key of the model's structure, and of the kind of prompt; None where something stands on its modules.

    Hooks and a `forward` of its own (as accelerate sets it) may do anything, so such a model is like no other.

    Args:
        model: the model.
        inputs: processor tensors.
        image: whether they hold image tokens.
    """
    modules = []
    for path, module in model.named_modules():
        own = vars(module)
        if "forward" in own or any(map(_is_foreign, _standing_on(module))):
            return None
        plain = tuple(
            (name, _hashable(value))
            for name, value in own.items()
            if name not in _NO_PART and _is_plain(value)
        )
        modules.append((path, type(module), type(module).forward, plain, _attention(module)))
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    held: dict[int, int] = {}
    sizes = tuple((*_of(name, value), held.setdefault(id(value), len(held))) for name, value in tensors)
    given = tuple(_of(name, value) for name, value in sorted(inputs.items()) if isinstance(value, Tensor))
    return tuple(modules), sizes, _configuration(model), given, image


def _standing_on(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _is_foreign(hook: Any) -> bool:
    """Whether a hook may change what a module does; those that transformers records hidden states with only look."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def _of(name: str, tensor: Tensor) -> tuple[Hashable, ...]:
    return name, tuple(tensor.shape), tensor.dtype, tensor.device, type(tensor)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(one) for one in value)
    return isinstance(value, _PLAIN)


def _hashable(value: Any) -> Hashable:
    return tuple(_hashable(one) for one in value) if isinstance(value, tuple | list) else value


def _attention(module: nn.Module) -> str | None:
    """The way of attention that a module's configuration names: modules may have configurations of their own."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _configuration(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    known = config.to_dict() if hasattr(config, "to_dict") else {}
    return json.dumps(dict(_entries(known)), default=repr, sort_keys=True)


def _entries(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if str(name).lstrip("_") not in _OF_A_FILE:
            yield str(name), dict(_entries(value)) if isinstance(value, Mapping) else value
