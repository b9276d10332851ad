"""Causal language models without images."""

from __future__ import annotations

from typing import Any

from tests.architectures.recipe import Builder
from tests.architectures.shrink import DROP, WINDOW

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
NEMOTRON = {
    "num_hidden_layers": 8,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"] * 2,
}
ZAMBA = dict.fromkeys(
    [
        "hybrid_layer_ids",
        "attention_hidden_size",
        "attention_head_dim",
        "mamba_headdim",
        "kv_channels",
        "num_query_groups",
    ],
    DROP,
)


def _text(model_type: str, *alternating: str, **config: Any) -> Builder:
    """An entry; `alternating` are the kinds of its layers, each twice in turn."""
    if alternating:
        config |= {"num_hidden_layers": 2 * len(alternating), "layer_types": [*alternating] * 2}
    return Builder(model_type, config, pixels=None, causal=True)


TEXT = {
    "qwen2": _text("qwen2"),
    "qwen2+sliding": _text(
        "qwen2", "sliding_attention", "full_attention", use_sliding_window=True, sliding_window=WINDOW
    ),
    "qwen3": _text("qwen3"),
    "qwen3_moe": _text("qwen3_moe", mlp_only_layers=[1]),
    "qwen3_next": _text("qwen3_next"),
    "qwen3_5_text": _text("qwen3_5_text"),
    "qwen3_5_moe_text": _text("qwen3_5_moe_text"),
    "llama": _text("llama"),
    "mistral": _text("mistral"),
    "mixtral": _text("mixtral"),
    "gemma2": _text("gemma2", query_pre_attn_scalar=24),
    "gemma3_text": _text("gemma3_text", query_pre_attn_scalar=24),
    "phi3": _text("phi3"),
    "olmo2": _text("olmo2"),
    "gpt2": _text("gpt2"),
    "gpt_neox": _text("gpt_neox"),
    "gpt_oss": _text("gpt_oss", rope_parameters=YARN),
    "deepseek_v3": _text("deepseek_v3", head_dim=DROP, num_key_value_heads=4),
    "cohere2": _text("cohere2", logit_scale=1.0),
    "granite": _text("granite", residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=2.0),
    "jamba": _text(
        "jamba", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_offset=0
    ),
    "bamba": _text("bamba", num_hidden_layers=4, attn_layer_indices=[1, 3]),
    "nemotron_h": _text("nemotron_h", **NEMOTRON),
    "zamba2": _text("zamba2", adapter_rank=8, num_key_value_heads=4, num_mem_blocks=2, **ZAMBA),
    "falcon_h1": _text("falcon_h1", mamba_d_ssm=128),
    "granitemoehybrid": _text(
        "granitemoehybrid",
        "linear_attention",
        "full_attention",
        residual_multiplier=0.5,
        embedding_multiplier=2.0,
    ),
    "lfm2": _text("lfm2", "conv", "full_attention"),
    "mamba": _text("mamba"),
    "mamba2": _text("mamba2", num_heads=8, head_dim=16, n_groups=2),
}
