"""Models that take one image of a fixed size as `[batch, 3, height, width]`, or as its row of patches."""

from __future__ import annotations

from typing import Any

from tests.architectures.inputs import noise
from tests.architectures.recipe import Builder
from tests.architectures.shrink import DROP, IMAGE, VISION_WIDTH, VOCABULARY, WIDTH, WINDOW
from tests.architectures.text import YARN

PIXELS = {"pixel_values": noise(1, 3, 16, 16)}  # 4 x 4 patches
SIZED = {"pixel_values": noise(1, 3, 16, 32), "image_sizes": [[16, 32]]}  # merged to 2 x 4

BACKBONES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 24},
    "qwen3": {},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "phi3": {},
    "cohere2": {},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "olmo2": {},
    "gpt_oss": {"rope_parameters": YARN},
}
LLAMA4 = {
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 96,
    "intermediate_size": 24,
    "interleave_moe_layer_step": 2,
    "moe_layers": DROP,
    "no_rope_layers": DROP,
    "no_rope_layer_interval": 2,
    "floor_scale": 8,
}
MISTRAL_LARGE4 = {
    "num_key_value_heads": 4,
    "head_dim": DROP,
    "kv_source_layers": [0, 0, 2, 2],
    "no_rope_layers": [1, 1, 0, 0],
    "indexer_types": ["full", "shared"] * 2,
}
DISCRETE = (
    "pixels become discrete tokens: the logits move where a token changes, and have no gradient to the pixels"
)
CODES = {f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 100 + i for i in range(32)}
VISUAL = {f"<|visual token {i:06d}|>": 100 + i for i in range(32)}


def one(
    model_type: str, image: int, text: dict[str, Any], vision: dict[str, Any] | None = None, **config: Any
) -> Builder:
    """An entry with an image of 4 x 4 patches."""
    return Builder(model_type, {"text_config": text, "vision_config": vision or {}, **config}, image, PIXELS)


def _llava(text: dict[str, Any]) -> Builder:
    return one("llava", 16, text, image_seq_length=16)


def _internvl(text: dict[str, Any]) -> Builder:
    return one("internvl", 4, text, image_seq_length=4)


SINGLE_IMAGES = {
    "llava": _llava({}),
    "internvl": _internvl({}),
    **{f"llava+{kind}": _llava({"model_type": kind, **more}) for kind, more in BACKBONES.items()},
    **{f"internvl+{kind}": _internvl({"model_type": kind, **more}) for kind, more in BACKBONES.items()},
    "vipllava": one("vipllava", 16, {}, image_seq_length=16, vision_feature_layer=[-1, -2]),
    "video_llava": one("video_llava", 16, {}, image_seq_length=16),
    "aya_vision": one("aya_vision", 4, {}),
    "cohere2_vision": one("cohere2_vision", 4, {}, alignment_intermediate_size=48),
    "deepseek_vl": one("deepseek_vl", 16, {}),
    "janus": one(
        "janus",
        16,
        {},
        {"depth": 2, "projection_dim": WIDTH},
        vq_config={"projection_dim": VISION_WIDTH, "image_token_embed_dim": VISION_WIDTH},
    ),
    "qianfan_ocr": one("qianfan_ocr", 4, {}, image_seq_length=4),
    "ovis2": Builder(
        "ovis2",
        {
            "vision_config": {"vocab_size": 40, "hidden_stride": 2},
            "visual_indicator_token_ids": [185, 186, 187, 188, 189],
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
        },
        [185, *[IMAGE] * 4, 186],
        PIXELS,
    ),
    "llama4": one(
        "llama4", 4, LLAMA4, {"intermediate_size": 128, "projector_input_dim": 64, "vision_output_dim": 64}
    ),
    "mistral3": Builder(
        "mistral3", {"text_config": {"sliding_window": WINDOW}, "vision_config": {"image_size": 32}}, 8, SIZED
    ),
    "mistral_large4": Builder(
        "mistral_large4", {"text_config": MISTRAL_LARGE4, "vision_config": {"image_size": 32}}, 8, SIZED
    ),
    "lighton_ocr": Builder("lighton_ocr", {"vision_config": {"image_size": 32}}, 8, SIZED),
    "molmo2": Builder(
        "molmo2",
        {
            "text_config": {"vocab_size": VOCABULARY - 16, "additional_vocab_size": 16},
            "vision_config": {"num_position_embeddings": 16},
            "adapter_config": {"vision_feature_layer": [-1, -2]},
        },
        4,
        {
            "pixel_values": noise(1, 16, 48),
            "image_grids": [[2, 2, 0, 0]],
            "image_num_crops": [1],
            "image_token_pooling": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
        },
    ),
    "perception_lm": Builder(
        "perception_lm",
        {"vision_config": {"model_type": "clip_vision_model", "model_args": {"embed_dim": VISION_WIDTH}}},
        16,
        {"pixel_values": noise(1, 1, 3, 16, 16)},
        note="timm is not installed: CLIP's tower stands in for its Perception Encoder",
    ),
    "fuyu": Builder("fuyu", {}, 8, {"image_patches": noise(1, 8, 48)}, "image_patches"),
    "chameleon": Builder(
        "chameleon", {"vocabulary_map": {"<image>": IMAGE, **CODES}}, 64, PIXELS, note=DISCRETE
    ),
    "emu3": Builder(
        "emu3",
        {
            "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 189, **VISUAL},
            "vq_config": {"hidden_size": 64},
        },
        8 * (8 + 1),
        {**PIXELS, "image_sizes": [[16, 16]]},
        note=DISCRETE,
    ),
    "mistral4": Builder(
        "mistral4",
        {"head_dim": 16, "qk_nope_head_dim": 8, "num_key_value_heads": 4},
        pixels=None,
        note="a causal language model, though the mapping lists it",
    ),
}
