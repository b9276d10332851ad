"""The anatomy of a model that is not run: its checkpoint is compared, or its parameters are frozen for training.

A model of the same class and configuration with weights that cost nothing (`hooks.anatomy.rebuilt`) is watched in its
place, so that an address means here what it means in `HookedVLM`. Weights on the meta device, on many devices, sharded
or quantized make no difference: they are not looked at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hooks.anatomy import Anatomy, find_anatomy
from hooks.anatomy.by_names import declared_anatomy
from hooks.anatomy.rebuilt import rebuilt
from hooks.errors import FrankenlensError
from hooks.processors import image_token_of
from hooks.selfcheck import opening_inputs

READ_OFF = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "idefics3"})
"""Types whose module tree alone says the same, at once (a test holds it against what is watched)."""


def unopened_anatomy(model: PreTrainedModel, processor: Any = None) -> Anatomy:
    """Where the parts of a model are, without a forward pass of it.

    Watching an architecture takes two forward passes of a few words at its full size: seconds for 7B.

    Args:
        model: the model; only its class and configuration are used, and the names of its modules.
        processor: its processor. The vision side is watched on an image, which it makes; without it, a vision tower is
            read off the module tree, where its parts go by names that are known.

    Raises:
        FrankenlensError: the architecture does not run from its configuration alone.
    """
    if getattr(model.config, "model_type", "") in READ_OFF:
        return declared_anatomy(model)
    try:
        with torch.no_grad():
            other = rebuilt(type(model), model.config)
            inputs = opening_inputs(other, processor)
            found = find_anatomy(other, inputs, image_token_of(other, processor))
    except Exception as error:
        raise FrankenlensError(
            f"which weights of {type(model).__name__} belong to which part is seen by running it, and one built from "
            f"its configuration does not run: {type(error).__name__}: {' '.join(str(error).split())[:300]} Open the model "
            "itself: HookedVLM(model, processor)."
        ) from error
    return found if found.vision.blocks else _with_named_vision(found, model)


def _with_named_vision(found: Anatomy, model: PreTrainedModel) -> Anatomy:
    """A vision tower that no image was there for, by the names of its parts."""
    try:
        named = declared_anatomy(model)
    except (FrankenlensError, AttributeError, KeyError, ValueError):
        return found
    if not named.vision.blocks or named.vision.path == found.text.path:
        return found
    absent = {part: why for part, why in found.absent.items() if part != "projector" or not named.projector}
    return replace(
        found,
        vision=named.vision,
        projector=named.projector,
        projector_key=named.projector_key,
        projector_weights=named.projector_weights,
        deepstack=named.deepstack,
        absent=absent,
    )
