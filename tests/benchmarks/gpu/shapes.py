"""Models of real shapes with random weights, made on the device itself, and prompts of tensors: no downloads.

Qwen2.5-VL-7B, Qwen3-VL-8B and Llama-3.1-8B, by their published configurations; "tiny" are the same classes for a CPU.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.initialization import no_init_weights

from hooks.loading import auto_class
from interp.prompts import Prompt
from tests.families import redraw

SIZES = ("full", "tiny")
MODELS = ("qwen2_5_vl", "qwen3_vl", "llama")
CONFIGS = {"qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig, "llama": LlamaConfig}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_TINY: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=512, rms_norm_eps=1e-6,
)  # fmt: skip
TEXT: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen2_5_vl", "full"): dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=128000, rms_norm_eps=1e-6,
        rope_parameters=_ROPE | {"mrope_section": [16, 24, 24]},
    ),
    ("qwen3_vl", "full"): dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=262144, rms_norm_eps=1e-6,
        rope_parameters=_ROPE | {"rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    ),
    ("llama", "full"): dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters=_LLAMA_ROPE,
    ),
    ("qwen2_5_vl", "tiny"): _TINY | dict(rope_parameters=_ROPE | {"mrope_section": [2, 3, 3]}),
    ("qwen3_vl", "tiny"): _TINY | dict(head_dim=16, rope_parameters=_ROPE | {"mrope_section": [3, 3, 2]}),
    ("llama", "tiny"): _TINY | dict(max_position_embeddings=16384, rope_parameters=_LLAMA_ROPE),
}  # fmt: skip
VISION: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen2_5_vl", "full"): dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=3584, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
    ),
    ("qwen3_vl", "full"): dict(
        depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=4096, num_position_embeddings=2304,
        deepstack_visual_indexes=[8, 16, 24],
    ),
    ("qwen2_5_vl", "tiny"): dict(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1],
    ),
    ("qwen3_vl", "tiny"): dict(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=36, deepstack_visual_indexes=[0, 2],
    ),
}  # fmt: skip
IDS = {  # pixels' placeholder, video's, and what stands around an image
    "full": dict(
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653
    ),
    "tiny": dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8),
}  # fmt: skip
WORDS = {"full": (10, 128000), "tiny": (10, 256)}
"""Ids that text is drawn from: none of them is special."""


@dataclass(frozen=True)
class Size:
    """Of a prompt.

    Attributes:
        n_tokens: in all.
        grid: patches of its image, rows and columns; four are one token. None: no image.
    """

    n_tokens: int
    grid: tuple[int, int] | None = None


PROMPTS = {
    ("qwen2_5_vl", "full"): Size(1300, (50, 80)),  # 1,000 of them image
    ("qwen3_vl", "full"): Size(1300, (50, 80)),
    ("llama", "full"): Size(16),
    ("qwen2_5_vl", "tiny"): Size(40, (8, 12)),
    ("qwen3_vl", "tiny"): Size(40, (8, 12)),
    ("llama", "tiny"): Size(16),
}
SMALL = Size(40, (8, 12))
"""What a model is opened on."""


def config_of(name: str, size: str) -> Any:
    """The configuration of a shape."""
    none: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    text: dict[str, Any] = TEXT[name, size] | none
    if name == "llama":
        return LlamaConfig(**text, tie_word_embeddings=False)
    return CONFIGS[name](
        text_config=text, vision_config=VISION[name, size], tie_word_embeddings=False, **IDS[size]
    )


@torch.no_grad()
def model_of(name: str, size: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """The model with weights drawn on the device: norm gains, biases and all (`tests.families.redraw`)."""
    config = config_of(name, size)
    with torch.device(device), no_init_weights():
        model = auto_class(config).from_config(config, dtype=dtype, attn_implementation="sdpa")
    redraw(model, seed)
    return model.eval().requires_grad_(False)


def inputs_of(model: Any, size: str, of: Size, seed: int) -> dict[str, Tensor]:
    """One prompt as a processor gives it, on the CPU: two words, an image if there is one, and words to its end."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    low, high = WORDS[size]
    ids = torch.randint(low, high, (1, of.n_tokens), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if of.grid is None or getattr(config, "vision_config", None) is None:
        return found
    vision = config.vision_config
    patches, merged = of.grid[0] * of.grid[1], vision.spatial_merge_size**2
    n_image = patches // merged
    ids[0, 2], ids[0, 3 + n_image] = config.vision_start_token_id, config.vision_end_token_id
    ids[0, 3 : 3 + n_image] = config.image_token_id
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    found["pixel_values"] = torch.randn(patches, width, generator=generator)
    found["image_grid_thw"] = torch.tensor([[1, *of.grid]])
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        found["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return found


def prompt_of(model: Any, size: str, of: Size, seed: int) -> Prompt:
    """The same as a prompt."""
    own = getattr(model.config, "image_token_id", None)
    return Prompt.from_inputs(inputs_of(model, size, of, seed), image_token_id=own, name=f"prompt {seed}")
