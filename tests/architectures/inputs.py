"""What a processor would hand to a model, written down without one: tokens, masks, pixels by their shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from tests.architectures.shrink import FIRST_MARK, IMAGE

BEFORE, AFTER = 5, 14
"""Text tokens before and after the image."""

STARTS = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index", "im_start_id")
ENDS = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index", "im_end_id")
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")

Make: TypeAlias = Callable[[Generator], Tensor]
Given: TypeAlias = Make | Sequence[Any] | None


def noise(*shape: int) -> Make:
    """Normal random numbers: pixels."""
    return lambda generator: torch.randn(shape, generator=generator)


def ones(*shape: int) -> Make:
    """A mask that masks nothing."""
    return lambda generator: torch.ones(shape, dtype=torch.long)


def words(n: int) -> Make:
    """`n` tokens of text, `[1, n]`."""
    return lambda generator: torch.randint(3, FIRST_MARK, (1, n), generator=generator)


def boxes(n: int) -> Make:
    """The places of `n` tokens on a page, corners between 0 and 1: `[1, n, 4]`."""
    return lambda generator: torch.rand(1, n, 4, generator=generator).sort(dim=-1).values


def placed_patches(rows: int, columns: int, size: int) -> Make:
    """Flattened patches that begin with their row and column, counted from 1: `[1, rows * columns, 2 + size]`."""

    def make(generator: Generator) -> Tensor:
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) + 1
        pixels = torch.randn(len(places), size, generator=generator)
        return torch.cat([places.float(), pixels], dim=1)[None]

    return make


def prompt(
    model: PreTrainedModel, image: int | Sequence[int], tensors: Mapping[str, Given], generator: Generator
) -> dict[str, Tensor]:
    """Text, the image between the marks that the model's configuration has for it, and text again.

    Arguments:
        image: the image's tokens: a number of placeholders, or the tokens themselves.
        tensors: the other inputs, `Make` or numbers; None takes an input away.
    """
    marks = [_mark(model, names) if image else [] for names in (STARTS, ENDS)]
    between = [IMAGE] * image if isinstance(image, int) else list(image)
    tokens = torch.tensor([[*marks[0], *between, *marks[1]]], dtype=torch.long)
    ids = torch.cat([words(BEFORE)(generator), tokens, words(AFTER)(generator)], dim=1)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    taken = inspect.signature(model.forward).parameters
    if image:
        inputs |= {name: (ids == IMAGE).long() for name in TYPES if name in taken}
    for name, value in tensors.items():
        if value is None:
            del inputs[name]
        else:
            inputs[name] = torch.tensor(value) if isinstance(value, Sequence) else value(generator)
    return inputs


def _mark(model: PreTrainedModel, names: Sequence[str]) -> list[int]:
    return [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None][
        :1
    ]
