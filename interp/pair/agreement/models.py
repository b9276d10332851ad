"""What differs between two models: their class, the settings that enter the forward pass, their tensors and ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hooks.errors import one_line
from hooks.stored.inventory import Inventory
from interp.pair.agreement.difference import Difference, named, said, settings, unequal
from interp.pair.agreement.trial import entering_settings

_PLACES = frozenset({"_name_or_path", "transformers_version"})
"""Where and by what a file was written; no two checkpoints share it, and it is no setting."""
_TIE = "tie_word_embeddings"
"""Whether two tensors are one is seen on the tensors, whatever this says."""


def model_differences(a: nn.Module, b: nn.Module, inputs: Mapping[str, Any]) -> list[Difference]:
    """What differs in class, configuration, and names, shapes, types and ties of tensors; values are not compared.

    A setting enters the forward pass if a model of the same class with weights that cost nothing computes something
    else with it, on the prompt as it is or with all lengths (windows, longest contexts) brought within its reach.

    Args:
        a, b: the models.
        inputs: a prompt that `a` takes, with an image if it sees any; as tensors.
    """
    if type(a) is not type(b):
        return [Difference("architecture", f"architecture: {type(a).__name__} and {type(b).__name__}")]
    return [*_of_settings(a, b, inputs), *tensor_differences(a, b)]


def tensor_differences(a: nn.Module, b: nn.Module) -> list[Difference]:
    """What differs in names, shapes and types of the state dicts, and in which of them are one tensor."""
    return [
        Difference(f"tensor {one.name}", f"tensor {one.name}: {one.ours} and {one.theirs}")
        for one in Inventory.of(a).unlike(Inventory.of(b))
    ]


def _of_settings(a: Any, b: Any, inputs: Mapping[str, Any]) -> list[Difference]:
    ours, theirs = (dict(settings(model.config.to_dict())) for model in (a, b))
    which = [one for one in unequal(ours, theirs) if one[-1] not in (*_PLACES, _TIE)]
    why = ""
    try:
        live = entering_settings(type(a), a.config, ours, theirs, which, inputs)
    except Exception as error:  # whatever a model raises: then nothing shows that a setting is spelling
        live, why = which, f" (not tried: {type(error).__name__}: {one_line(error, 100)})"
    return [Difference(named(one), f"setting {said(one, ours, theirs)}{why}", one in live) for one in which]
