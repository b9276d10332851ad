"""A difference between two checkpoints, and whether it enters what they compute.

Files of one and the same checkpoint are spelled in many ways: every version of transformers and every trainer adds
settings of its own. So no list of settings says which of them matter. Instead, what is computed with the settings of
one is computed again with those of the other put in their place; what then stays the same, bit for bit, is spelling.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooks.stored.inventory import ABSENT

Setting = tuple[Any, ...]
"""Where a setting stands: `("text_config", "rope_parameters", "rope_theta")`."""


@dataclass(frozen=True)
class Difference:
    """What is not alike in two models or processors.

    Attributes:
        name: what it is called where it is accepted: `text_config.rms_norm_eps`, `chat_template`, `token '<new>'`.
        text: the sentence about it, with both values.
        enters: whether it enters what is computed; otherwise the two are spelled in two ways.
    """

    name: str
    text: str
    enters: bool = True

    def __str__(self) -> str:
        return self.text

    @property
    def can_be_accepted(self) -> bool:
        """Whether two models may go on together in spite of it: not if tensors of one do not fit into the other."""
        return not self.name.startswith(("architecture", "tensor "))


def entering(differences: Iterable[Difference], accepted: Sequence[str] = ()) -> list[Difference]:
    """Those that enter what is computed and were not accepted by name."""
    return [one for one in differences if one.enters and not (one.can_be_accepted and one.name in accepted)]


def named(setting: Setting) -> str:
    """A setting as it is written: its parts with dots."""
    return ".".join(map(str, setting))


def settings(tree: Mapping[Any, Any], before: Setting = ()) -> Iterator[tuple[Setting, Any]]:
    """Every leaf of nested settings; sequences are leaves, and tuples and arrays are lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from settings(value, (*before, key))
        else:
            listed = value.tolist() if isinstance(value, np.ndarray) else value
            yield (*before, key), list(listed) if isinstance(listed, tuple) else listed


def unequal(a: Mapping[Setting, Any], b: Mapping[Setting, Any]) -> list[Setting]:
    """The settings that are not alike, one that only one of them has among them."""
    missing = object()
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key, missing) != b.get(key, missing)]


def with_settings(
    owner: Any, values: Mapping[Setting, Any], which: Iterable[Setting], shared: Any = None
) -> Any:
    """A copy of a configuration or processor in which these settings are those of `values`; one it lacks is gone.

    Args:
        owner: the configuration or processor.
        values: settings of another.
        which: what is taken from it, or taken away where it has none.
        shared: a part that needs no copy.
    """
    changed = copy.deepcopy(owner, {id(shared): shared})
    for setting in which:
        *outer, last = setting
        holder = changed
        for part in outer:
            holder = _inside(holder, part)
        if setting in values:
            _put(holder, last, copy.deepcopy(values[setting]))
        else:
            _take(holder, last)
    return changed


def acting(which: Sequence[Setting], act: Callable[[Sequence[Setting]], bool]) -> list[Setting]:
    """Those of the settings that change what is computed; all that are left where they act only together.

    Args:
        which: the settings.
        act: whether what is computed changes when all of these are changed.
    """
    if not which or not act(which):
        return []
    if len(which) == 1:
        return list(which)
    half = len(which) // 2
    return [*acting(which[:half], act), *acting(which[half:], act)] or list(which)


def said(setting: Setting, a: Mapping[Setting, Any], b: Mapping[Setting, Any]) -> str:
    """A setting with both of its values."""
    return f"{named(setting)}: {a.get(setting, ABSENT)!r} and {b.get(setting, ABSENT)!r}"


def _inside(holder: Any, part: Any) -> Any:
    if isinstance(holder, MutableMapping):
        return holder.setdefault(part, {})
    if not hasattr(holder, part) or getattr(holder, part) is None:
        setattr(holder, part, {})
    return getattr(holder, part)


def _put(holder: Any, name: Any, value: Any) -> None:
    if hasattr(type(holder), "__setitem__"):
        holder[name] = value
    else:
        setattr(holder, name, value)


def _take(holder: Any, name: Any) -> None:
    if isinstance(holder, MutableMapping):
        holder.pop(name, None)
    elif hasattr(type(holder), "__setitem__"):  # an image's size, whose fields are there always
        holder[name] = None
    elif name in vars(holder):
        delattr(holder, name)
