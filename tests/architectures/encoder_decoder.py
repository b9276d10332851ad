"""Encoder-decoders: the image goes in with the encoder's text or alone, the logits are those of the decoder's text."""

from __future__ import annotations

from tests.architectures.convolutional import PAGE, SAM
from tests.architectures.inputs import AFTER, BEFORE, boxes, ones, placed_patches, words
from tests.architectures.recipe import Builder
from tests.architectures.shrink import WIDTH
from tests.architectures.single import PIXELS

DECODED = {"decoder_input_ids": words(12)}
ALONE = {"input_ids": None, "attention_mask": None, **DECODED}

ENCODER_DECODERS = {
    "florence2": Builder(
        "florence2",
        {
            "vision_config": {
                "projection_dim": WIDTH,
                "embed_dim": [16, 16, 24, 32],
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 2, 4],
                "num_groups": [2, 2, 2, 4],
                "patch_size": [7, 3, 3, 3],
                "window_size": 2,
            }
        },
        4 + 1,
        {**PAGE, **DECODED},
    ),
    "udop": Builder("udop", {}, 0, {**PIXELS, "bbox": boxes(BEFORE + AFTER), **DECODED}),
    "pix2struct": Builder(
        "pix2struct",
        {
            "vision_config": {"patch_embed_hidden_size": 48, "hidden_size": WIDTH, "d_kv": 16},
            "text_config": {"d_kv": 16},
        },
        0,
        {**ALONE, "flattened_patches": placed_patches(4, 4, 48), "attention_mask": ones(1, 16)},
        "flattened_patches",
    ),
    "pp_formulanet": Builder(
        "pp_formulanet",
        {
            "vision_config": {
                **SAM,
                "post_conv_in_channels": 16,
                "post_conv_mid_channels": 24,
                "post_conv_out_channels": 32,
                "decoder_hidden_size": WIDTH,
            }
        },
        0,
        {**PAGE, **ALONE},
    ),
    "vision-encoder-decoder": Builder("vision-encoder-decoder", {}, 0, {**PIXELS, **ALONE}),
}
