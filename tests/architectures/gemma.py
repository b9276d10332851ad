"""Gemma and its kin: PaliGemma, Gemma 3, 3n and 4, block diffusion, and the policy that acts on PaliGemma's caches."""

from __future__ import annotations

from typing import Any

from tests.architectures.convolutional import PAGE
from tests.architectures.inputs import noise, words
from tests.architectures.recipe import Builder
from tests.architectures.shrink import VOCABULARY, WIDTH
from tests.architectures.single import PIXELS, one
from tests.architectures.stand_in import gemma3n_vision

SCALED = {"query_pre_attn_scalar": 24}
WIDE_HEADS = {"per_layer_config": {1: {"head_dim": 48}, 3: {"head_dim": 48}}}
EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
CORNERS = {"image_position_ids": [[[x, y] for y in range(4) for x in range(4)]]}
GEMMA3N = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "intermediate_size": 96,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "vocab_size_per_layer_input": 180,
}
GEMMA3N_AUDIO = {
    "vocab_size": 5,
    "vocab_offset": 195,
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 4,
    "sscp_conv_channel_size": [8, 4],
}
UNIFIED = {
    "model_type": "gemma4_unified_vision",
    "pooling_kernel_size": 2,
    "mm_embed_dim": 48,
    "mm_posemb_size": 16,
    "output_proj_dims": 48,
}


def _paligemma(text: dict[str, Any]) -> Builder:
    return one(
        "paligemma",
        16,
        text,
        {"projection_dim": WIDTH},
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
    )


def _gemma4(**text: Any) -> Builder:
    config = {
        "text_config": {**WIDE_HEADS, **text},
        "vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2},
        "audio_config": None,
    }
    return Builder("gemma4", config, 4, {"pixel_values": noise(1, 16, 48), **CORNERS})


GEMMAS = {
    "paligemma": _paligemma({}),
    "paligemma+gemma2": _paligemma({"model_type": "gemma2", **SCALED}),
    "gemma3": one("gemma3", 4, SCALED, mm_tokens_per_image=4),
    "shieldgemma2": one("shieldgemma2", 4, SCALED, mm_tokens_per_image=4),
    "gemma3n": Builder(
        "gemma3n",
        {
            "text_config": GEMMA3N,
            "vision_config": gemma3n_vision,
            "audio_config": GEMMA3N_AUDIO,
            "vision_soft_tokens_per_image": 4,
        },
        4,
        PAGE,
        note="timm is not installed: a ConvNeXt stands in for its MobileNet",
    ),
    "gemma4": _gemma4(),
    "gemma4+experts": _gemma4(enable_moe_block=True, **EXPERTS),
    "gemma4+shared_keys": _gemma4(num_kv_shared_layers=2, attention_k_eq_v=True),
    "gemma4_unified": Builder(
        "gemma4_unified",
        {"text_config": WIDE_HEADS, "vision_config": UNIFIED, "audio_config": None},
        16,
        {"pixel_values": noise(1, 16, 192), **CORNERS},
    ),
    "diffusion_gemma": Builder(
        "diffusion_gemma",
        {
            "text_config": {**WIDE_HEADS, **EXPERTS},
            "vision_config": {"pooling_kernel_size": 2},
            "canvas_length": 8,
        },
        4,
        {"pixel_values": noise(1, 16, 48), **CORNERS, "decoder_input_ids": words(8)},
        note="the logits are those of the canvas that is denoised, not of the prompt",
    ),
    "t5gemma2": Builder(
        "t5gemma2",
        {"encoder": {"text_config": SCALED, "mm_tokens_per_image": 4}, "decoder": SCALED},
        4,
        {**PIXELS, "decoder_input_ids": words(12)},
    ),
    "pi0": Builder(
        "pi0",
        {"vlm_config": {"vision_config": {"projection_dim": WIDTH}, "projection_dim": WIDTH}},
        16,
        {
            "pixel_values": noise(1, 1, 3, 16, 16),
            "pixel_attention_mask": [[True]],
            "state": noise(1, 32),
            "noise": noise(1, 8, 32),
            "timestep": [0.3],
        },
        note="the logits are velocities of actions, not words",
    ),
}
