"""Models that take one image of a fixed size as `[batch, 3, height, width]`, or as its rows of patches."""

from __future__ import annotations

from typing import Any

from tests.architectures.recipe import Builder, Noise
from tests.architectures.shrink import DROP, IMAGE, VOCABULARY, WIDTH, WINDOW
from tests.architectures.text import YARN

PIXELS = {"pixel_values": Noise(1, 3, 16, 16)}  # 4 x 4 patches


def _one(
    model_type: str, image: int, text: dict[str, Any], vision: dict[str, Any] | None = None, **config: Any
) -> Builder:
    return Builder(model_type, {"text_config": text, "vision_config": vision or {}, **config}, image, PIXELS)


def _llava(text: dict[str, Any], **config: Any) -> Builder:
    return _one("llava", 16, text, image_seq_length=16, **config)


def _internvl(text: dict[str, Any], **config: Any) -> Builder:
    return _one("internvl", 4, text, image_seq_length=4, **config)


def _paligemma(text: dict[str, Any]) -> Builder:
    return _one(
        "paligemma", 16, text, {"projection_dim": WIDTH}, projection_dim=WIDTH, hidden_size=WIDTH,
        vocab_size=VOCABULARY,
    )  # fmt: skip


BACKBONES = {
    "gemma2": {"query_pre_attn_scalar": 24},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "phi3": {},
    "cohere2": {},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "olmo2": {},
    "gpt_oss": {"rope_parameters": YARN},
    "qwen3": {},
}
LLAMA4 = {
    "intermediate_size_mlp": 96, "intermediate_size": 24, "interleave_moe_layer_step": 2, "moe_layers": DROP,
    "no_rope_layers": DROP, "no_rope_layer_interval": 2, "num_hidden_layers": 4, "floor_scale": 8,
}  # fmt: skip

SINGLE_IMAGES = {
    "llava": _llava({}),
    "internvl": _internvl({}),
    "paligemma": _paligemma({}),
    "paligemma+gemma2": _paligemma({"model_type": "gemma2", **BACKBONES["gemma2"]}),
    **{f"llava+{kind}": _llava({"model_type": kind, **more}) for kind, more in BACKBONES.items()},
    **{f"internvl+{kind}": _internvl({"model_type": kind, **more}) for kind, more in BACKBONES.items()},
    "vipllava": _one("vipllava", 16, {}, image_seq_length=16, vision_feature_layer=[-1, -2]),
    "video_llava": _one("video_llava", 16, {}, image_seq_length=16),
    "aya_vision": _one("aya_vision", 4, {}),
    "cohere2_vision": _one("cohere2_vision", 4, {}, alignment_intermediate_size=48),
    "deepseek_vl": _one("deepseek_vl", 16, {}),
    "ovis2": _one(
        "ovis2", 4, {}, {"vocab_size": 40, "hidden_stride": 2}, visual_indicator_token_ids=[185, 186, 187, 188, 189],
        vocab_size=VOCABULARY, hidden_size=WIDTH,
    ),
    "gemma3": _one("gemma3", 4, {"query_pre_attn_scalar": 24}, mm_tokens_per_image=4),
    "llama4": _one(
        "llama4", 4, LLAMA4, {"intermediate_size": 128, "projector_input_dim": 64, "vision_output_dim": 64},
    ),
    "mistral3": Builder(
        "mistral3", {"text_config": {"sliding_window": WINDOW}, "vision_config": {"image_size": 32}}, 8,
        {"pixel_values": Noise(1, 3, 16, 32), "image_sizes": [[16, 32]]},
    ),
    "gemma4": Builder(
        "gemma4", {
            "text_config": {"per_layer_config": {1: {"head_dim": 48}, 3: {"head_dim": 48}}},
            "vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2}, "audio_config": None,
        }, 4, {"pixel_values": Noise(1, 16, 48), "image_position_ids": [[[x, y] for y in range(4) for x in range(4)]]},
    ),
    "molmo2": Builder(
        "molmo2", {
            "text_config": {"vocab_size": VOCABULARY - 16, "additional_vocab_size": 16},
            "vision_config": {"num_position_embeddings": 16},
            "adapter_config": {"vision_feature_layer": [-1, -2]},
        }, 4, {
            "pixel_values": Noise(1, 16, 48), "image_grids": [[2, 2, 0, 0]], "image_num_crops": [1],
            "image_token_pooling": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
        },
    ),
    "blip-2": Builder(
        "blip-2",
        {"image_token_index": IMAGE, "image_text_hidden_size": 32, "qformer_config": {"num_hidden_layers": 2}},
        6, PIXELS,
    ),
}  # fmt: skip
