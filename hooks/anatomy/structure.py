"""What decides how a model computes, but for its weights' numbers: two models with the same structure have one anatomy.

An IN checkpoint and what RL made of it, or the same model opened again, are watched once; the second is proved on its
own weights (`hooks.opening`).
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# None may be the place of what a run leaves behind; functions are activations, say.
_PLAIN = (bool, int, float, str, torch.dtype, FunctionType, BuiltinFunctionType)
_OF_A_FILE = ("name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of a configuration that say where it came from, or what the weights say themselves."""
_SAMPLED = 64
_NO_PART = frozenset({*vars(nn.Module()), *_OF_A_FILE, "_is_hf_initialized"})


def structure_of(model: nn.Module, inputs: Mapping[str, Any], image: bool) -> Hashable | None:
    """A key of the model's structure, and of the kind of prompt; None where something stands on its modules.

    Hooks and a `forward` of its own (as accelerate sets it) may do anything, so such a model is like no other.

    Args:
        model: the model.
        inputs: processor tensors.
        image: whether they hold image tokens.
    """
    modules, configurations = [], _Configurations()
    for path, module in model.named_modules():
        own = vars(module)
        if "forward" in own or any(map(_is_foreign, _standing_on(module))):
            return None
        plain = tuple(
            (name, _hashable(value))
            for name, value in own.items()
            if name not in _NO_PART and _is_plain(value)
        )
        modules.append((path, type(module), type(module).forward, plain, configurations.of(module)))
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    held: dict[int, int] = {}
    sizes = tuple((*_of(name, value), held.setdefault(id(value), len(held))) for name, value in tensors)
    given = tuple(_of(name, value) for name, value in sorted(inputs.items()) if isinstance(value, Tensor))
    return tuple(modules), sizes, given, image


def _standing_on(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _is_foreign(hook: Any) -> bool:
    """Whether a hook may change what a module does; those that transformers records hidden states with only look."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def _of(name: str, tensor: Tensor) -> tuple[Hashable, ...]:
    return name, tuple(tensor.shape), tensor.dtype, tensor.device, type(tensor)


def tells_its_parts_apart(model: nn.Module) -> bool:
    """Whether no matrix of a model is nothing but zeros, or the same as another: what is seen of it holds for others.

    Of a model in which a projection gives out nothing, or what another gives out, less can be seen than of its like.
    """
    seen: dict[tuple[Hashable, ...], Tensor] = {}
    for value in model.parameters():
        if value.ndim < 2:
            continue
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu()
        if not bool(some.any()) and not bool(flat.any()):
            return False
        key = (value.device, *value.shape, *some.tolist())
        if key in seen and torch.equal(seen[key], value):
            return False
        seen[key] = value.detach()
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(one) for one in value)
    if isinstance(value, dict):
        return all(_is_plain(one) for one in (*value, *value.values()))
    return isinstance(value, _PLAIN)


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((name, _hashable(one)) for name, one in value.items())
    return tuple(_hashable(one) for one in value) if isinstance(value, tuple | list) else value


class _Configurations:
    """The configurations that modules hold, which need not be parts of the model's own, as text."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[str, str | None]] = {}

    def of(self, module: nn.Module) -> tuple[str, str | None] | None:
        """That of a module, and the way of attention that it names."""
        config: Any = getattr(module, "config", None)
        if not hasattr(config, "to_dict"):
            return None
        if id(config) not in self._told:
            text = json.dumps(dict(_entries(config.to_dict())), default=repr, sort_keys=True)
            self._told[id(config)] = (text, getattr(config, "_attn_implementation", None))
        return self._told[id(config)]


def _entries(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if str(name).lstrip("_") not in _OF_A_FILE:
            yield str(name), dict(_entries(value)) if isinstance(value, Mapping) else value
