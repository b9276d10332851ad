"""Models that take the patches of all images in one row, without a batch axis, and a grid that says whose they are."""

from __future__ import annotations

from typing import Any

from tests.architectures.inputs import noise
from tests.architectures.recipe import Builder
from tests.architectures.shrink import DROP, VISION_WIDTH, WIDTH

GRID = {"image_grid_thw": [[1, 4, 8]]}
MERGED = 8  # tokens of 2 x 2 patches
PACKED = {"pixel_values": noise(32, 96), **GRID}  # 32 patches of 3 channels, 2 frames and 4 x 4 pixels
UNFRAMED = {"pixel_values": noise(32, 48), **GRID}
SQUARE = {"pixel_values": noise(32, 3, 4, 4), **GRID}

ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
WINDOWED = {"window_size": 16, "fullatt_block_indexes": [1]}
DEEPSTACK = {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
MARKS: dict[str, Any] = {"vision_start_token_id": 188, "vision_end_token_id": 189}


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary positions of time, height and width."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


def grid(
    model_type: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    tensors: dict[str, Any] = PACKED,
    image: int = MERGED,
    **config: Any,
) -> Builder:
    """An entry with a grid of 4 x 8 patches."""
    return Builder(model_type, {"text_config": text, "vision_config": vision, **config}, image, tensors)


NARROW = {"rope_parameters": mrope(2, 3, 3)}  # heads of 16
WIDE = {"rope_parameters": mrope(6, 5, 5)}  # heads of 32
QUARTER = {"rope_parameters": mrope(2, 1, 1, partial_rotary_factor=0.25)}
HALF = {"rope_parameters": mrope(1, 1, 2, partial_rotary_factor=0.5)}
FOURFOLD = {"rope_parameters": mrope(4, 4, 4, 4)}
COMPASS = {"sliding_attention": WIDE["rope_parameters"], "full_attention": None}

PACKED_PATCHES = {
    "qwen2_vl": grid("qwen2_vl", NARROW, {"hidden_size": WIDTH}),
    "qwen2_5_vl": grid("qwen2_5_vl", NARROW, WINDOWED),
    "qwen3_vl": grid("qwen3_vl", WIDE, DEEPSTACK),
    "qwen3_vl_moe": grid("qwen3_vl_moe", {**WIDE, "mlp_only_layers": [1]}, DEEPSTACK),
    "qwen3_5": grid("qwen3_5", QUARTER, {"num_position_embeddings": 64}),
    "qwen3_5_moe": grid("qwen3_5_moe", QUARTER, {"num_position_embeddings": 64}),
    "qwen2_5_omni_thinker": grid("qwen2_5_omni_thinker", NARROW, WINDOWED, **MARKS),
    "qwen3_omni_moe_thinker": grid(
        "qwen3_omni_moe_thinker", WIDE, DEEPSTACK, audio_config={"downsample_hidden_size": 16}, **MARKS
    ),
    "cosmos3_omni": grid("cosmos3_omni", WIDE, DEEPSTACK),
    "cosmos3_edge": grid("cosmos3_edge", WIDE, {"num_patches": 64}, UNFRAMED, projector_hidden_size=48),
    "glm4v": grid("glm4v", HALF, {"image_size": 32}),
    "glm46v": grid("glm46v", HALF, {"image_size": 32}),
    "glmga": grid("glmga", HALF, {"image_size": 32}),
    "glm4v_moe": grid("glm4v_moe", HALF, {"image_size": 32}),
    "glm_ocr": grid("glm_ocr", NARROW, {"image_size": 32}),
    "kimi_k25": grid(
        "kimi_k25",
        {"head_dim": DROP, "num_key_value_heads": 4},
        {"pos_emb_height": 8, "pos_emb_width": 8},
        SQUARE,
        projection_hidden_size=VISION_WIDTH,
    ),
    "cohere_compass": grid("cohere_compass", {**ALTERNATING, "rope_parameters": COMPASS}, DEEPSTACK),
    "exaone4_5": grid("exaone4_5", {}, {**WINDOWED, "num_key_value_heads": 2}),
    "ernie4_5_vl_moe": grid(
        "ernie4_5_vl_moe",
        {"moe_intermediate_size": [24, 16], "rope_parameters": mrope(3, 3, 2)},
        {},
        UNFRAMED,
    ),
    "hyperclovax_vision_v2": grid("hyperclovax_vision_v2", {"residual_multiplier": 0.5}, WINDOWED),
    "hunyuan_vl": grid(
        "hunyuan_vl",
        {"head_dim": 32, **FOURFOLD},
        {"max_image_size": 64, "min_image_size": 16, "img_max_token_num": 64},
        UNFRAMED,
        image=1 + 2 * (4 + 1) + 1,  # each row ends with a newline
    ),
    "paddleocr_vl": grid("paddleocr_vl", WIDE, {}, SQUARE),
    "video_llama_3": grid("video_llama_3", {}, {}, {**UNFRAMED, "image_merge_sizes": [2]}),
}
