"""Tiny random models of every image-text-to-text architecture of transformers, and of causal language models.

`ARCHITECTURES` names them as transformers does; after a `+` stands what differs from the default, such as the
language model inside. `build("llava+gemma2")` gives one, with a prompt for it. An entry (`recipe.py`) says only what
is peculiar to it: `shrink.py` makes the default configuration of its type tiny, `randomize.py` draws the weights,
`inputs.py` writes the prompt. `UNBUILDABLE` says why some are missing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.architectures.convolutional import CONVOLUTIONAL
from tests.architectures.encoder_decoder import ENCODER_DECODERS
from tests.architectures.gemma import GEMMAS
from tests.architectures.hybrid import HYBRIDS
from tests.architectures.packed import PACKED_PATCHES
from tests.architectures.queried import QUERIED_IMAGES
from tests.architectures.recipe import Builder, TinyModel
from tests.architectures.single import SINGLE_IMAGES
from tests.architectures.text import TEXT
from tests.architectures.tiled import TILED_IMAGES

__all__ = ["ARCHITECTURES", "UNBUILDABLE", "Builder", "TinyModel", "build"]

ARCHITECTURES: Mapping[str, Builder] = {
    **PACKED_PATCHES,
    **HYBRIDS,
    **SINGLE_IMAGES,
    **GEMMAS,
    **CONVOLUTIONAL,
    **TILED_IMAGES,
    **QUERIED_IMAGES,
    **ENCODER_DECODERS,
    **TEXT,
}
UNBUILDABLE: Mapping[str, str] = {}
"""Architectures of the mapping that no entry is for, with the reason."""


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyModel:
    """A tiny model of the architecture `name` of `ARCHITECTURES`; the same arguments, the same weights and inputs.

    Raises:
        KeyError: `name` is no entry.
    """
    return ARCHITECTURES[name](seed, dtype)
