"""Models that read the image through queries of their own, or by attending to it from within the text."""

from __future__ import annotations

from typing import Any

from tests.architectures.inputs import AFTER, BEFORE, noise, ones, placed_patches, words
from tests.architectures.recipe import Builder
from tests.architectures.shrink import IMAGE
from tests.architectures.single import PIXELS

QUERIES = 6
INSTRUCTION = {"qformer_input_ids": words(5), "qformer_attention_mask": ones(1, 5)}
SLOT = {"image_embeds_position_mask": [[0] * BEFORE + [1] * QUERIES + [0] * AFTER]}


def _blip2(model_type: str, image: int, tensors: dict[str, Any]) -> Builder:
    config = {
        "image_token_index": IMAGE,
        "video_token_index": IMAGE,
        "image_text_hidden_size": 32,
        "qformer_config": {"num_hidden_layers": 2},
    }
    return Builder(model_type, config, image, tensors)


QUERIED_IMAGES = {
    "blip-2": _blip2("blip-2", QUERIES, PIXELS),
    "instructblip": _blip2("instructblip", QUERIES, {**PIXELS, **INSTRUCTION}),
    "instructblipvideo": _blip2(
        "instructblipvideo", 2 * QUERIES, {"pixel_values": noise(1, 2, 3, 16, 16), **INSTRUCTION}
    ),
    "aria": Builder(
        "aria",
        {
            "projector_patch_to_query_dict": {16: QUERIES},
            "max_value_projector_patch_to_query_dict": QUERIES,
        },
        QUERIES,
        PIXELS,
    ),
    "kosmos-2": Builder("kosmos-2", {"latent_query_num": QUERIES}, QUERIES, {**PIXELS, **SLOT}),
    "kosmos-2.5": Builder(
        "kosmos-2.5",
        {
            "latent_query_num": QUERIES,
            "vision_config": {"patch_embed_hidden_size": 48, "max_num_patches": 16},
        },
        QUERIES,
        {"flattened_patches": placed_patches(4, 4, 48), **SLOT},
        "flattened_patches",
    ),
    "blip": Builder("blip", {"image_text_hidden_size": 32}, 0, PIXELS),
    "git": Builder("git", {}, 0, PIXELS, note="the image is put before the text: more logits than tokens"),
    "idefics": Builder(
        "idefics",
        {"num_hidden_layers": 4, "cross_layer_interval": 2},
        0,
        {"pixel_values": noise(1, 1, 3, 16, 16), "image_attention_mask": ones(1, BEFORE + AFTER, 1)},
    ),
    "evolla": Builder(
        "evolla",
        {
            "num_hidden_layers": 4,
            "aligner_num_add_layers": 2,
            "resampler_depth": 2,
            "resampler_dim_head": 16,
            "resampler_heads": 4,
            "resampler_num_latents": QUERIES,
            "protein_encoder_config": {"mask_token_id": 4},
        },
        0,
        {"protein_input_ids": words(10), "protein_attention_mask": ones(1, 10)},
        "protein_input_ids",
        note="reads a protein, no image",
    ),
}
