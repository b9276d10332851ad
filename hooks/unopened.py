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
from hooks.anatomy.observed import require_all_blocks
from hooks.anatomy.rebuilt import rebuilt
from hooks.anatomy.watching import has_pixels
from hooks.errors import FrankenlensError, one_line
from hooks.processors import image_token_of, is_visual
from hooks.selfcheck import opening_inputs

READ_OFF = frozenset(
    {
        ("qwen2_vl", "qwen2_vl_text", "qwen2_vl_vision"),
        ("qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_vl_vision"),
        ("qwen3_vl", "qwen3_vl_text", "qwen3_vl_vision"),
        ("llava", "llama", "clip_vision_model"),
        ("smolvlm", "llama", "smolvlm_vision"),
        ("idefics3", "llama", "idefics3_vision"),
    }
)
"""Types (of the whole, its language model and its vision tower) whose module tree alone says the same, at once; a test
holds it against what is watched."""


def unopened_anatomy(model: PreTrainedModel, processor: Any = None) -> Anatomy:
    """Where the parts of a model are, without a forward pass of it.

    Watching an architecture takes two forward passes of a few words at its full size: seconds for 7B.

    Args:
        model: the model; only its class and configuration are used, and the names of its modules.
        processor: its processor. The vision side is watched on an image, which it makes; without it, `vision` and
            `projector` are absent and their weights are in `rest`, unless the type is one of `READ_OFF`.

    Raises:
        FrankenlensError: the architecture does not run from its configuration alone.
    """
    if is_read_off(model.config):
        return declared_anatomy(model)
    try:
        with torch.no_grad():
            other = rebuilt(type(model), model.config)
            inputs = opening_inputs(other, processor)
            found = find_anatomy(other, inputs, image_token_of(other, processor))
        if is_visual(model.config) and not has_pixels(inputs):
            require_all_blocks(other, found)
    except FrankenlensError:
        raise
    except Exception as error:
        raise FrankenlensError(
            f"which weights of {type(model).__name__} belong to which part is seen by running it, and one built from "
            f"its configuration does not run: {type(error).__name__}: {one_line(error)} Open the "
            "model itself: HookedVLM(model, processor)."
        ) from error
    if found.vision.blocks or hasattr(processor, "image_processor") or not is_visual(model.config):
        return found
    why = "no image was there to see it by: give the model's processor"
    return replace(found, absent={**found.absent, "vision": why, "projector": why})


def is_read_off(config: Any) -> bool:
    """Whether the module tree of a model of this configuration says where its parts are."""
    return _types(config) in READ_OFF


def _types(config: Any) -> tuple[str, ...]:
    parts = (config, config.get_text_config(), getattr(config, "vision_config", None))
    return tuple(getattr(part, "model_type", "") for part in parts)
