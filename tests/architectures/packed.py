"""Models that take the patches of all images in one row, without a batch axis, and a grid that says whose they are."""

from __future__ import annotations

from typing import Any

from tests.architectures.recipe import Builder, Noise
from tests.architectures.shrink import DROP, VISION_WIDTH, WIDTH

GRID = {"image_grid_thw": [[1, 4, 8]]}
PACKED = {"pixel_values": Noise(32, 96), **GRID}  # 32 patches of 3 channels, 2 frames and 4 x 4 pixels
UNFRAMED = {"pixel_values": Noise(32, 48), **GRID}
MERGED = 8  # tokens of 2 x 2 patches
WINDOWED = {"window_size": 16, "fullatt_block_indexes": [1]}


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


def _grid(
    model_type: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    tensors: dict[str, Any] = PACKED,
    **config: Any,
) -> Builder:
    return Builder(model_type, {"text_config": text, "vision_config": vision, **config}, MERGED, tensors)


DEEPSTACK = {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
HALF = mrope(1, 1, 2, partial_rotary_factor=0.5)
LINEAR = {"rope_parameters": mrope(2, 1, 1, partial_rotary_factor=0.25)}
VISION_MARKS: dict[str, Any] = {"vision_start_token_id": 188, "vision_end_token_id": 189}
GLM_VISION = {"image_size": 32}

PACKED_GRIDS = {
    "qwen2_vl": _grid("qwen2_vl", {"rope_parameters": mrope(2, 3, 3)}, {"hidden_size": WIDTH}),
    "qwen2_5_vl": _grid("qwen2_5_vl", {"rope_parameters": mrope(2, 3, 3)}, WINDOWED),
    "qwen3_vl": _grid("qwen3_vl", {"rope_parameters": mrope(6, 5, 5)}, DEEPSTACK),
    "qwen3_vl_moe": _grid(
        "qwen3_vl_moe", {"rope_parameters": mrope(6, 5, 5), "mlp_only_layers": [1]}, DEEPSTACK
    ),
    "qwen3_5": _grid("qwen3_5", LINEAR, {"num_position_embeddings": 64}),
    "qwen3_5_moe": _grid("qwen3_5_moe", LINEAR, {"num_position_embeddings": 64}),
    "qwen2_5_omni_thinker": _grid(
        "qwen2_5_omni_thinker", {"rope_parameters": mrope(2, 3, 3)}, WINDOWED, **VISION_MARKS,
    ),
    "qwen3_omni_moe_thinker": _grid(
        "qwen3_omni_moe_thinker", {"rope_parameters": mrope(6, 5, 5)}, DEEPSTACK,
        audio_config={"downsample_hidden_size": 16}, **VISION_MARKS,
    ),
    "glm4v": _grid("glm4v", {"rope_parameters": HALF}, GLM_VISION),
    "glm46v": _grid("glm46v", {"rope_parameters": HALF}, GLM_VISION),
    "glmga": _grid("glmga", {"rope_parameters": HALF}, GLM_VISION),
    "glm4v_moe": _grid("glm4v_moe", {"rope_parameters": HALF}, GLM_VISION),
    "glm_ocr": _grid("glm_ocr", {"rope_parameters": mrope(2, 3, 3)}, GLM_VISION),
    "kimi_k25": _grid(
        "kimi_k25", {"head_dim": DROP, "num_key_value_heads": 4},
        {"pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4},
        {"pixel_values": Noise(32, 3, 4, 4), **GRID}, projection_hidden_size=VISION_WIDTH,
    ),
}  # fmt: skip
