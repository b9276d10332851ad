"""One entry of the table, and how it becomes a model: it says what is peculiar to it, the rest is derived."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import transformers
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.architectures.inputs import prompt
from tests.architectures.randomize import randomize
from tests.architectures.shrink import IMAGE, tiny_config


class TinyModel(NamedTuple):
    """A tiny random model in eval mode, one prompt for it, and where that has its image."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    image_mask: Bool[Tensor, "batch pos"] | None
    """The placeholders that features of the image replace; None where there are none (no image, or one that is
    attended to or put before the text)."""


@dataclass(frozen=True)
class Builder:
    """One entry of the table; calling it builds the model.

    Arguments:
        model_type: the type whose default configuration is made tiny.
        config: what the tiny configuration overrides; parts of the configuration are mappings.
        image: the image's tokens in the prompt, a number of placeholders or the tokens themselves.
        tensors: the inputs beyond the text: what `inputs.py` makes, or numbers; None takes one away.
        pixels: the input that holds the image; None for text only.
        causal: built as a causal language model rather than one of images and text.
        attended: the image is attended to from its token, and nothing put there.
        note: what a reader of a table of results should know.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    image: int | Sequence[int] = 0
    tensors: Mapping[str, Any] = field(default_factory=dict)
    pixels: str | None = "pixel_values"
    causal: bool = False
    attended: bool = False
    note: str = ""

    def __call__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyModel:
        """The model and its prompt; the global state of random numbers stays as it was."""
        names = (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if self.causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        )
        kind: type[PreTrainedModel] = getattr(transformers, names[self.model_type])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind._from_config(tiny_config(self.model_type, self.config), dtype=dtype)
        _keep_in_fp32(model, dtype)
        randomize(model, seed)
        model.eval()
        inputs = prompt(model, self.image, self.tensors, torch.Generator().manual_seed(seed))
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        mask = inputs["input_ids"] == IMAGE if self.image and not self.attended else None
        return TinyModel(model, inputs, mask)


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Some weights of some classes stay in fp32 when a checkpoint is loaded in half precision; here too."""
    kept = [rf"(^|\.){name}(\.|$)" for name in model._get_dtype_plan(dtype)]
    for name, weight in model.named_parameters():
        if any(re.search(pattern, name) for pattern in kept):
            weight.data = weight.data.float()
