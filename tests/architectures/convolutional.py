"""Readers of documents and others whose encoder is convolutional or SAM's: windows, 4-D maps, two encoders."""

from __future__ import annotations

from tests.architectures.inputs import noise
from tests.architectures.recipe import Builder
from tests.architectures.shrink import VISION_WIDTH, WIDTH, WINDOW
from tests.architectures.single import PIXELS

PAGE = {"pixel_values": noise(1, 3, 64, 64)}
SAM = {"image_size": 64, "global_attn_indexes": [1]}
CONVNEXT = {"hidden_sizes": [16, 16, 24, VISION_WIDTH], "depths": [1] * 4, "hidden_size": VISION_WIDTH}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}

CONVOLUTIONAL = {
    "got_ocr2": Builder("got_ocr2", {"vision_config": SAM, "image_seq_length": 16}, 16, PAGE),
    "pp_chart2table": Builder("pp_chart2table", {"vision_config": SAM, "image_seq_length": 16}, 16, PAGE),
    "deepseek_ocr2": Builder(
        "deepseek_ocr2",
        {
            "text_config": {
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
            },
            "vision_config": {"sam_config": {**SAM, "downsample_channels": [32, WIDTH]}},
        },
        144 + 1,  # a fixed number of queries, and a separator
        PAGE,
    ),
    "unlimited_ocr": Builder(
        "unlimited_ocr",
        {"vision_config": {"sam_config": {**SAM, "downsample_channels": [32, WIDTH]}}},
        4 * (4 + 1) + 1,
        PAGE,
    ),
    "deepseek_vl_hybrid": Builder(
        "deepseek_vl_hybrid",
        {"high_res_vision_config": SAM},
        16,
        {**PIXELS, "high_res_pixel_values": noise(1, 3, 64, 64)},
    ),
    "step3p7": Builder(
        "step3p7",
        {
            "vision_config": {"image_size": 32, "max_position_embeddings": 64},
            "text_config": {
                "sliding_window": WINDOW,
                "num_sliding_attention_heads": 8,
                "query_pre_attn_scalar": 24,
                "rope_parameters": {"full_attention": ROTARY, "sliding_attention": ROTARY},
            },
        },
        4,
        {"pixel_values": noise(1, 3, 32, 32)},
    ),
    "fast_vlm": Builder(
        "fast_vlm",
        {"vision_config": {"model_type": "convnext", **CONVNEXT}},
        4,
        PAGE,
        note="timm is not installed: a ConvNeXt stands in for its FastViT",
    ),
}
