"""The default configuration of any architecture, made tiny: sizes are known by the names of fields, everywhere alike.

What transformers gives as default is what is kept: which branches a block has, norms, biases, activations, patterns
of layers. Only sizes change, and the numbers of special tokens. `overrides` says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 200
WIDTH = 64
VISION_WIDTH = 32
WINDOW = 8
IMAGE, VIDEO, AUDIO = 190, 191, 192
FIRST_MARKER = 180  # start, end and newline tokens are numbered from here; text stays below
DROP = object()
"""As a value of `overrides`: the field is left to the configuration class, which derives it from the others."""

FORGOTTEN = {
    "architectures", "transformers_version", "_name_or_path", "id2label", "label2id", "dtype", "torch_dtype",
    "use_cache", "_attn_implementation_autoset",
}  # fmt: skip

SHARED = {
    "patch_size": 4, "image_size": 16, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2, "moe_k": 2, "moe_topk": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": DROP, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "text_hidden_size": WIDTH, "out_hidden_size": WIDTH,
    "projector_output_dim": WIDTH, "encoder_hidden_size": VISION_WIDTH, "projection_dim": VISION_WIDTH,
    "cross_hidden_size": VISION_WIDTH, "num_query_tokens": 6, "max_position_embeddings": 512,
    "n_positions": 512, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
    "ssm_state_size": 16, "state_size": 16, "mamba_d_state": 16, "mamba_dt_rank": 8, "time_step_rank": 8,
    "mamba_chunk_size": 16, "chunk_size": 16, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16,
    "mamba_head_dim": 16, "n_mamba_heads": 8, "conv_dim": WIDTH, "index_topk": 12, "index_n_heads": 2,
    "index_head_dim": 16,
    # sizes of convolutional and SAM-type encoders
    "window_size": 2, "output_channels": 16, "num_pos_feats": 16, "mlp_dim": 48, "insert_layer_id": 1,
    "base_channels": 32, "latent_channels": 16, "num_embeddings": 32, "channel_multiplier": [1, 2],
    "num_res_blocks": 1, "resolution": 16, "interpolate_mode": "bilinear",
}  # fmt: skip
"""Sizes that are the same in every part."""

TEXT = {
    "hidden_size": WIDTH, "d_model": WIDTH, "n_embd": WIDTH, "embed_dim": WIDTH, "word_embed_proj_dim": WIDTH,
    "intermediate_size": 96, "ffn_dim": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_ff": 96,
    "num_hidden_layers": 3, "n_layer": 3, "layers": 3, "encoder_layers": 3, "decoder_layers": 3,
    "num_layers": 3, "num_decoder_layers": 3,
    "num_attention_heads": 4, "n_head": 4, "attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "d_kv": 24,
    "vocab_size": VOCABULARY,
}  # fmt: skip
"""Grouped keys, and heads that are together wider than the stream wherever a configuration has a head size."""

VISION = {
    "hidden_size": VISION_WIDTH, "embed_dim": VISION_WIDTH, "d_model": VISION_WIDTH,
    "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48,
    "num_hidden_layers": 3, "depth": 3, "num_layers": 3, "encoder_layers": 3, "layers": 3,
    "num_attention_heads": 4, "num_heads": 4, "attention_heads": 4, "encoder_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "mlp_ratio": 2, "vocab_size": VOCABULARY,
}  # fmt: skip

LANGUAGE = ("text", "decoder", "encoder", "dit")
"""Parts of a configuration that have a language model's sizes, by their names; the others have a vision tower's."""

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "depth", "layers")
WINDOWS = ("sliding_window", "attention_chunk_size")
MARKERS = ("_token_id", "_token_index", "_id", "_index")
FIXED = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "image": IMAGE, "image_patch": IMAGE, "img": IMAGE,
         "video": VIDEO, "audio": AUDIO}  # fmt: skip


def tiny_config(model_type: str, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of `model_type` with every known size small and `overrides` merged in.

    An override of a part that names another `model_type` starts from that type's default instead.
    """
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(_default(model_type, overrides), overrides, TEXT, {}))


def _default(model_type: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The default of a type as plain data; parts that `overrides` gives another type have that type's default."""
    fields = CONFIG_MAPPING[model_type]().to_dict()
    for name, value in overrides.items():
        if isinstance(value, Mapping) and (kind := value.get("model_type")):
            fields[name] = _default(kind, value)
    return fields


def _shrunk(
    fields: Mapping[str, Any], overrides: Mapping[str, Any], sizes: Mapping[str, Any], markers: dict[str, int]
) -> dict[str, Any]:
    pattern = _pattern(fields)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in FORGOTTEN or (name in overrides and not isinstance(overrides[name], Mapping)):
            continue
        small[name] = value
        if name in pattern:
            small[name] = pattern[name]
        elif isinstance(value, Mapping) and "model_type" in value:
            part = TEXT if any(word in name for word in LANGUAGE) else VISION
            small[name] = _shrunk(value, overrides.get(name, {}), part, markers)
        elif (marker := _marker(name, value)) is not None:
            small[name] = (
                FIXED.get(marker)
                if marker in FIXED
                else markers.setdefault(marker, FIRST_MARKER + len(markers))
            )
        elif value is not None and name in WINDOWS:
            small[name] = WINDOW
        elif name in sizes or name in SHARED:
            small[name] = _resized(value, sizes.get(name, SHARED.get(name)))
    parts = {name for name, value in fields.items() if isinstance(value, Mapping) and "model_type" in value}
    small |= {name: value for name, value in overrides.items() if name not in parts or value is None}
    return {name: value for name, value in small.items() if value is not DROP}


def _resized(value: Any, size: Any) -> Any:
    """A size in the form its default has: None stays (what a configuration leaves out), a list keeps its length."""
    if value is None or size is DROP:
        return DROP
    if isinstance(value, (list, tuple)) and not isinstance(size, list):
        return [size] * len(value)
    return size


def _marker(name: str, value: Any) -> str | None:
    """`image` for `image_token_id`, where that is the number of a token."""
    if isinstance(value, bool) or not isinstance(value, (int, list)):
        return None
    suffix = next((s for s in MARKERS if name.endswith(s)), None)
    return name.removesuffix(suffix).strip("_") if suffix else None


def _pattern(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers and all lists with an entry a layer, cut so that each kind of layer occurs twice."""
    depth_name = next((name for name in DEPTHS if isinstance(fields.get(name), int)), None)
    if depth_name is None:
        return {}
    depth = fields[depth_name]
    lists = {
        name: value for name, value in fields.items()
        if isinstance(value, list) and len(value) == depth and value and not isinstance(value[0], list)
    }  # fmt: skip
    kinds = {name: list(dict.fromkeys(value)) for name, value in lists.items()}
    cycles = {name: kind for name, kind in kinds.items() if 1 < len(kind) < max(depth, 2)}
    length = max([3, *(2 * len(kind) for kind in cycles.values())])
    pattern: dict[str, Any] = {depth_name: length}
    for name, value in lists.items():
        kind = cycles.get(name)
        pattern[name] = [kind[i % len(kind)] for i in range(length)] if kind else value[:length]
    return pattern
