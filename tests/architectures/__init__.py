"""Tiny random models of every image-text-to-text architecture of transformers, and of causal language models.

`ARCHITECTURES` names them as transformers does; after a `+`, the language model inside. `build("llava+gemma2")` gives
one, with a prompt for it. An entry (see `recipe.py`) says only what is peculiar to it: `shrink.py` makes the default
configuration of its type tiny, `randomize.py` draws the weights. `UNBUILDABLE` says why some are missing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.architectures.packed import PACKED_GRIDS
from tests.architectures.recipe import Builder, TinyModel
from tests.architectures.single import SINGLE_IMAGES
from tests.architectures.text import TEXT
from tests.architectures.tiled import TILED_IMAGES

__all__ = ["ARCHITECTURES", "UNBUILDABLE", "Builder", "TinyModel", "build"]

ARCHITECTURES: Mapping[str, Builder] = {**PACKED_GRIDS, **SINGLE_IMAGES, **TILED_IMAGES, **TEXT}
UNBUILDABLE: Mapping[str, str] = {}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyModel:
    """A tiny model of the architecture `name` of `ARCHITECTURES`; the same arguments, the same weights and inputs.

    Raises:
        KeyError: `name` is no entry.
    """
    return ARCHITECTURES[name](seed, dtype)
