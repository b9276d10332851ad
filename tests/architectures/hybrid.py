"""Packed patches before decoders whose layers differ: linear attention, convolutions, state spaces, indexers, gates."""

from __future__ import annotations

from tests.architectures.inputs import noise
from tests.architectures.packed import PACKED, QUARTER, UNFRAMED, grid
from tests.architectures.recipe import Builder
from tests.architectures.shrink import DROP, IMAGE, VISION_WIDTH, VOCABULARY, WIDTH
from tests.architectures.text import NEMOTRON

CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
DOTS_SLIDING = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "head_dim": 32,
}
DOTS = {"num_key_value_heads": 4, "head_dim": 24, "per_layer_config": {1: DOTS_SLIDING, 3: DOTS_SLIDING}}
DOTS_AUDIO = {
    "num_hidden_layers": 1,
    "adapter_input_size": VISION_WIDTH,
    "adapter_out_dim": WIDTH,
    "downsample_hidden_size": 8,
    "feature_size": 16,
}
MINIMAX = {
    "num_hidden_layers": 4,
    "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "rotary_dim": 16,
}
GLM5 = {
    "num_key_value_heads": 4,
    "head_dim": DROP,
    "qk_rope_head_dim": 0,
    "index_kpool": 4,
    "hc_mult": 2,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}
QWEN4 = {
    **QUARTER,
    "hc_lowrank": 16,
    "hc_count": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 12,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [3],  # counted from 1
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "number_of_conv_states": DROP,
    "eos_token_id": 2,
}
INKLING = {"unpadded_vocab_size": VOCABULARY, "rel_extent": 16, "d_rel": 8}
MUSE = {"pos_emb_height": 8, "pos_emb_width": 8}
MUSE_AUDIO = {"patch_sizes": [4] * 3, "hidden_sizes": [16] * 3, "depths": [1] * 3, "out_hidden_size": WIDTH}


def _minicpm(model_type: str, image: int) -> Builder:
    config = {
        "text_config": QUARTER,
        "vision_config": {"insert_layer_id": 1, "image_size": 32},
        "insert_layer_id": 1,
        "patch_size": 4,
        "image_token_id": IMAGE,
    }
    strip = {"pixel_values": noise(1, 3, 4, 4 * 32), "target_sizes": [[4, 8]]}
    return Builder(model_type, config, image, strip)


HYBRIDS = {
    "qwen4_exp": grid("qwen4_exp", QWEN4, {"num_position_embeddings": 64}),
    "glm5_next": grid("glm5_next", GLM5, {"image_size": 32, "projection_intermediate_size": 48}),
    "dots3_note": grid(
        "dots3_note",
        DOTS,
        {"adapter_in_dim": VISION_WIDTH, "adapter_out_dim": WIDTH},
        UNFRAMED,
        audio_config=DOTS_AUDIO,
    ),
    "minimax_m3_vl": grid(
        "minimax_m3_vl", MINIMAX, {"image_size": 32}, projector_hidden_size=48, merged_hidden_size=DROP
    ),
    "muse_glimmer": grid(
        "muse_glimmer", {}, MUSE, out_hidden_size=4 * VISION_WIDTH, projector_hidden_size=48
    ),
    "muse_spark": grid(
        "muse_spark",
        {},
        MUSE,
        out_hidden_size=4 * VISION_WIDTH,
        projector_hidden_size=48,
        audio_config=MUSE_AUDIO,
    ),
    "inkling2": grid(
        "inkling2",
        {**INKLING, "n_layers_per_attn_res_block": 2},
        {"posemb_grid_size": 8, "projection_hidden_dim": 48},
        {"pixel_values": noise(8, 8, 8, 3), "image_grid_thw": [[1, 2, 4]]},
    ),
    "inkling_mm_model": Builder(
        "inkling_mm_model",
        {
            "text_config": {**INKLING, "logits_mup_width_multiplier": 1.0},
            "vision_config": {"n_layers": 3},
            "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16},
        },
        8,
        {"pixel_values": noise(8, 2, 4, 4, 3)},
    ),
    "nemotron_h_omni": Builder(
        "nemotron_h_omni",
        {
            "text_config": NEMOTRON,
            "vision_config": {"max_img_size": 64, "patch_dim": DROP, "video_patch_dim": DROP},
            "vision_hidden_size": VISION_WIDTH,
            "projector_hidden_size": 48,
            "image_token_id": IMAGE,
        },
        8,
        {"pixel_values": noise(32, 48), "image_grid_hw": [[4, 8]]},
    ),
    "lfm2_vl": Builder(
        "lfm2_vl",
        {"text_config": CONVOLUTIONS, "vision_config": {"num_patches": 64}, "projector_hidden_size": 48},
        8,
        {
            "pixel_values": noise(1, 32, 48),
            "spatial_shapes": [[4, 8]],
            "pixel_attention_mask": [[1] * 32],
        },
    ),
    "lfm3_vl": grid("lfm3_vl", {}, {}, PACKED, projector_hidden_size=48),
    "minicpmv4_6": _minicpm("minicpmv4_6", 2),
    "minicpmv4_7": _minicpm("minicpmv4_7", 2),
    "minicpm_ocr": _minicpm("minicpm_ocr", 8),
}
