"""Gemma 3n sees through a MobileNet of timm, which is not installed: a ConvNeXt of transformers stands in for it.

It takes and gives what timm's would, `[batch, channels, height, width]`; all after it is Gemma 3n's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModel, ConvNextConfig, ConvNextModel, Gemma3nVisionConfig, PreTrainedModel

from tests.architectures.shrink import VISION_WIDTH


class StandInConfig(Gemma3nVisionConfig):
    """Gemma 3n's configuration of its vision, under a name of its own."""

    model_type = "gemma3n_vision_stand_in"


class StandIn(PreTrainedModel):
    """Four stages of convolutions: 64 x 64 pixels become 2 x 2."""

    config: StandInConfig
    config_class = StandInConfig

    def __init__(self, config: StandInConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.tower = ConvNextModel(ConvNextConfig(hidden_sizes=[16, 16, 24, width], depths=[1, 1, 1, 1]))
        self.post_init()

    def forward(self, pixel_values: Tensor, do_pooling: bool = False, **kwargs: Any) -> Any:
        return self.tower(pixel_values, **kwargs)


def gemma3n_vision() -> StandInConfig:
    """The configuration of the stand-in, for which `AutoModel` builds the stand-in from now on."""
    AutoModel.register(StandInConfig, StandIn, exist_ok=True)
    return StandInConfig(hidden_size=VISION_WIDTH, vocab_size=15, vocab_offset=180, num_classes=2)  # type: ignore
