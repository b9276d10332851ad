"""Models that cut an image into crops or tiles: pixels have an axis for them, and the prompt says how they lie."""

from __future__ import annotations

from typing import Any

from tests.architectures.inputs import AFTER, BEFORE, noise, ones
from tests.architectures.recipe import Builder
from tests.architectures.shrink import IMAGE, WIDTH

TILES = {"pixel_values": noise(1, 2, 3, 16, 16), "pixel_attention_mask": ones(1, 2, 16, 16)}


def _crops(model_type: str, **config: Any) -> Builder:
    """16 x 16 pixels as four crops of 8 x 8 and an overview: 4 x 4 tokens, a newline a row, 2 x 2 tokens."""
    cut = {"vision_config": {"image_size": 8}, "image_grid_pinpoints": [[16, 16]], **config}
    return Builder(
        model_type, cut, 4 * 4 + 4 + 4, {"pixel_values": noise(1, 5, 3, 8, 8), "image_sizes": [[16, 16]]}
    )


TILED_IMAGES = {
    "llava_next": _crops("llava_next", image_seq_length=4),
    "llava_next_video": _crops("llava_next_video", image_seq_length=4),
    "llava_onevision": _crops("llava_onevision"),
    "idefics3": Builder("idefics3", {}, 2 * 4, TILES),
    "smolvlm": Builder("smolvlm", {}, 2 * 4, TILES),
    "idefics2": Builder(
        "idefics2",
        {
            "perceiver_config": {
                "hidden_size": WIDTH,
                "num_key_value_heads": 2,
                "resampler_n_latents": 6,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
            }
        },
        2 * 6,
        TILES,
    ),
    "mllama": Builder(
        "mllama",
        {
            "text_config": {"cross_attention_layers": [1, 3], "num_hidden_layers": 4},
            "vision_config": {
                "num_global_layers": 2,
                "patch_size": 8,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 96,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
        },
        1,
        {
            "pixel_values": noise(1, 1, 2, 3, 16, 16),
            "aspect_ratio_ids": [[2]],
            "aspect_ratio_mask": [[[1, 1]]],
            "cross_attention_mask": [[[[int(at >= BEFORE)] * 2] for at in range(BEFORE + 1 + AFTER)]],
        },
        attended=True,
    ),
    "granite_docling": Builder(
        "granite_docling",
        {
            "text_config": {
                "residual_multiplier": 0.5,
                "embedding_multiplier": 2.0,
                "logits_scaling": 2.0,
                "attention_multiplier": 0.25,
            },
            "vision_config": {"deepstack_visual_indexes": [0, 2], "scale_factor": 2},
        },
        2 * 4,
        {"pixel_values": noise(1, 2, 3, 16, 16), "pixel_attention_mask": [[True, True]]},
    ),
    "granite4_vision": Builder(
        "granite4_vision",
        {
            "text_config": {"num_hidden_layers": 6},
            "vision_config": {"hidden_size": WIDTH},
            "qformer_config": {
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "hidden_size": WIDTH,
                "encoder_hidden_size": WIDTH,
            },
            "image_grid_pinpoints": [[16, 16]],
            "image_seq_length": 4,
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "spatial_target_layers": [2, 3, 4, 5],
        },
        2 * 2 + 2 + 2 * 2,
        {"pixel_values": noise(1, 2, 3, 16, 16), "image_sizes": [[16, 16]]},
    ),
    "phi4_multimodal": Builder(
        "phi4_multimodal",
        {
            "vision_config": {"crop_size": 16, "image_token_id": IMAGE},
            "audio_config": {
                "num_blocks": 1,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "input_size": 16,
                "nemo_conv_channels": 16,
                "nemo_final_size": 2,
            },
        },
        2 * (2 + 1) + 1 + 2 * (2 + 1),
        {
            "image_pixel_values": noise(1, 2, 3, 16, 16),
            "image_sizes": [[16, 16]],
            "image_attention_mask": ones(1, 2, 4, 4),
        },
        "image_pixel_values",
        causal=True,
        note="not in the mapping of images and text: a causal language model that sees",
    ),
}
