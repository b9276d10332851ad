"""Fewer layers for a stand-in: of every stack the first ones, so many that each kind of layer is among them.

What kind a layer is follows from both checkpoints: what its modules are, what the settings list for it (`layer_types`),
in which lists of layers it is (`fullatt_block_indexes`), before or behind which numbers of layers it lies
(`first_k_dense_replace`). So a setting that acts in some layers acts in the shortened model too.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import nn

from interp.pair.agreement.difference import Setting

Values = Mapping[Setting, Any]
_DEPTH = re.compile(r"^(num_hidden_layers|num_layers|n_layers?|depth)$")
_OF_LAYERS = re.compile(r"layer|block|index|dense|first|start")
_FEWEST = 2


def shortened(
    ours: Values, theirs: Values, models: Sequence[nn.Module]
) -> tuple[dict[Setting, Any], dict[Setting, Any]]:
    """The settings of both that change where every stack is cut off behind all of its kinds of layers.

    Args:
        ours, theirs: the settings.
        models: both models, on whatever device; what stands in their module lists is looked at.
    """
    new: tuple[dict[Setting, Any], dict[Setting, Any]] = ({}, {})
    for one, depth in ours.items():
        known = _DEPTH.search(str(one[-1])) and isinstance(depth, int) and depth > _FEWEST
        if not known or theirs.get(one) != depth:
            continue
        inside = [other for other in {**ours, **theirs} if other[: len(one) - 1] == one[:-1]]
        kinds = [
            tuple(
                _said(values[other], layer, depth, other)
                for values in (ours, theirs)
                for other in inside
                if other in values
            )
            for layer in range(depth)
        ]
        looks = [_looks(model, depth) for model in models]
        every = [(kind, *(look[layer] for look in looks)) for layer, kind in enumerate(kinds)]
        kept = max(_FEWEST, next(n for n in range(1, depth + 1) if set(every[:n]) == set(every)))
        if kept == depth:
            continue
        for values, changed in zip((ours, theirs), new, strict=True):
            changed[one] = kept
            for other in inside:
                if isinstance(value := values.get(other), list) and other != one:
                    cut = _cut(value, depth, kept, other)
                    changed |= {other: cut} if cut != value else {}
    return new


def _is_index(value: Any, depth: int, setting: Setting) -> bool:
    """Whether a list names layers, each at most once."""
    return (
        isinstance(value, list)
        and _OF_LAYERS.search(str(setting[-1])) is not None
        and all(isinstance(entry, int) and 0 <= entry < depth for entry in value)
        and value == sorted(set(value))
    )


def _said(value: Any, layer: int, depth: int, setting: Setting) -> Hashable:
    """What a setting says of one layer; None where it says nothing."""
    if _is_index(value, depth, setting):
        return layer in value
    if isinstance(value, list) and len(value) == depth:
        return repr(value[layer])
    named = _OF_LAYERS.search(str(setting[-1])) is not None and not _DEPTH.search(str(setting[-1]))
    return layer >= value if named and isinstance(value, int) and 0 < value < depth else None


def _cut(value: list[Any], depth: int, kept: int, setting: Setting) -> list[Any]:
    if _is_index(value, depth, setting):
        return [layer for layer in value if layer < kept]
    return value[:kept] if len(value) == depth else value


def _looks(model: nn.Module, depth: int) -> list[Hashable]:
    """What the modules of each layer are, in all lists of so many modules."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    return [tuple(_look(part[layer]) for part in lists) for layer in range(depth)]


def _look(module: nn.Module) -> Hashable:
    """Classes, shapes and what is set on them; of whole numbers, such as a layer's own, only that they are there."""
    found = []
    for name, part in module.named_modules():
        shapes = tuple(tuple(weight.shape) for weight in part.parameters(recurse=False))
        plain = (
            (key, value)
            for key, value in vars(part).items()
            if isinstance(value, bool | str | float | int | None)
        )
        set_ = tuple(sorted((key, repr(value) if not _is_whole(value) else "") for key, value in plain))
        found.append((name, type(part).__name__, shapes, set_))
    return tuple(found)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
