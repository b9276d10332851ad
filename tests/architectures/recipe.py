"""How one tiny model is written down and built: an entry says what is peculiar to it, the rest is derived."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.architectures.randomize import randomize
from tests.architectures.shrink import FIRST_MARKER, IMAGE, tiny_config

BEFORE, AFTER = 5, 14
"""Text tokens before and after the image."""


class TinyModel(NamedTuple):
    """A tiny random model in eval mode, one prompt for it, and where that has its image."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    image_mask: Bool[Tensor, "batch pos"] | None
    """Placeholders of the image; None where there are none (no image, or one that is only attended to)."""


@dataclass(frozen=True)
class Noise:
    """Normal random numbers of a shape: pixels."""

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class Ones:
    """Ones of a shape: masks."""

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class Words:
    """`n` random text tokens."""

    n: int


@dataclass(frozen=True)
class Builder:
    """One entry of the table.

    Arguments:
        model_type: the type whose default configuration is made tiny.
        config: what the tiny configuration overrides, with the parts' configurations as mappings.
        image: the image's tokens in the prompt, a number of placeholders or a list of token numbers; 0 for none.
        tensors: the other inputs: `Noise`, `Ones`, `Words`, or numbers as nested lists.
        text_only: built as a causal language model; `causal` likewise, for those that see.
        pixels: the input that holds the image; None for text only.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    image: int | list[int] = 0
    tensors: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    before: int = BEFORE
    pixels: str | None = "pixel_values"

    def __call__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyModel:
        config = tiny_config(self.model_type, self.config)
        kind = AutoModelForCausalLM if self.causal else AutoModelForImageTextToText
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = kind.from_config(config, dtype=dtype)
            generator = torch.Generator().manual_seed(seed + 1)
            inputs = self._inputs(model, generator)
        randomize(model, seed)
        model.eval()
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        mask = inputs["input_ids"] == IMAGE
        return TinyModel(model, inputs, mask if mask.any() else None)

    def _inputs(self, model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
        def words(n: int) -> Tensor:
            return torch.randint(3, FIRST_MARKER, (n,), generator=generator)

        def tensor(value: Any) -> Tensor:
            if isinstance(value, Noise):
                return torch.randn(value.shape, generator=generator)
            if isinstance(value, Ones):
                return torch.ones(value.shape, dtype=torch.long)
            if isinstance(value, Words):
                return words(value.n)[None]
            return torch.tensor(value)

        image = [IMAGE] * self.image if isinstance(self.image, int) else self.image
        ids = torch.cat([words(self.before), torch.tensor(image, dtype=torch.long), words(AFTER)])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        taken = inspect.signature(model.forward).parameters
        for name in {"token_type_ids", "mm_token_type_ids"} & taken.keys() if image else ():
            inputs[name] = (ids == IMAGE).long()
        return inputs | {name: tensor(value) for name, value in self.tensors.items()}
