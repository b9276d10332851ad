"""Names of tensors: from those on disk to those of the model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightRenaming,
    rename_source_key,
)

from hooks.errors import FrankenlensError


class Names:
    """Renames the keys of a checkpoint as transformers does at loading."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix, self._state = model.base_model_prefix, model.state_dict()
        wanted = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in wanted if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in wanted if not isinstance(entry, WeightRenaming)]

    def __call__(self, key: str, shape: tuple[int, ...] | None = None) -> tuple[str, tuple[int, ...] | None]:
        """The model's name of a key, of a tensor of that shape on disk.

        Where that is a part of the model's tensor (one expert's matrix), also its place among the parts, which follow
        one another in this order; None where it is the whole tensor.

        Raises:
            FrankenlensError: transformers would change the tensor itself.
        """
        where = (self._prefix, self._state)
        name, converted = rename_source_key(key, self._renamings, self._converters, *where)  # type: ignore[arg-type]
        if name not in self._state and key in self._state:
            name, converted = rename_source_key(key, [], [], *where)
        if converted is None or self._as_it_is(name, converted, shape):
            return name, None
        if (order := self._order(key, converted)) is None:
            raise FrankenlensError(
                f"{key} is stored in a layout that transformers converts at loading; load the model and save it with "
                "save_pretrained(folder, save_original_format=False) first."
            )
        return name, order

    def _order(self, key: str, pattern: str) -> tuple[int, ...] | None:
        """By expert, and then as their matrices are joined; None where more is done to them than that."""
        converter: Any = next(one for one in self._converters if pattern in one.source_patterns)
        steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
        single = steps == [(MergeModulelist, 0)] and len(converter.source_patterns) == 1
        if not single and steps != [(MergeModulelist, 0), (Concatenate, 1)]:
            return None
        numbers = [int(part) for part in key.split(".") if part.isdigit()]
        return (*numbers, converter.source_patterns.index(pattern))

    def _as_it_is(self, name: str, pattern: str, shape: tuple[int, ...] | None) -> bool:
        """Whether the conversion leaves a tensor of this shape alone: it transposes only what has another shape."""
        converter: Any = next(one for one in self._converters if pattern in one.source_patterns)
        only_if_other = all(getattr(operation, "check_dims", False) for operation in converter.operations)
        return only_if_other and name in self._state and tuple(self._state[name].shape) == shape
