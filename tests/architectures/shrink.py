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
FIRST_MARK = 180  # start, end and newline tokens are numbered from here; text stays below
DROP = object()
"""As a value of `overrides`: the field is left to the configuration class, which derives it from the others."""

FORGOTTEN = {
    "architectures", "transformers_version", "_name_or_path", "id2label", "label2id", "dtype", "torch_dtype",
    "use_cache", "per_layer_config",
}  # fmt: skip

SHARED = {
    # words and positions
    "max_position_embeddings": 512, "n_positions": 512, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16, "position_embedding_size": 16,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "top_k_experts": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "shared_intermediate_size": 24, "share_expert_dim": 24,
    "shared_experts_intermediate_size": 24, "moe_hidden_size": 48, "dense_intermediate_size": 96,
    # latent attention, indexers, linear attention, state spaces
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": DROP, "index_topk": 12, "index_n_heads": 2, "index_head_dim": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 24,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "ssm_state_size": 16, "state_size": 16, "mamba_d_state": 16,
    "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_chunk_size": 16, "chunk_size": 16, "mamba_n_heads": 8,
    "n_mamba_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16, "conv_dim": WIDTH,
    # images, and what leads from their towers to the text
    "image_size": 16, "patch_size": 4, "window_size": 2, "insert_layer_id": 1, "mlp_dim": 48,
    "output_channels": 16, "num_pos_feats": 16, "base_channels": 32, "latent_channels": 16, "resolution": 16,
    "channel_multiplier": [1, 2], "num_res_blocks": 1, "num_embeddings": 32, "codebook_size": 32,
    "num_query_tokens": 6, "text_hidden_size": WIDTH, "out_hidden_size": WIDTH, "projector_output_dim": WIDTH,
    "encoder_hidden_size": VISION_WIDTH, "cross_hidden_size": VISION_WIDTH, "projection_dim": VISION_WIDTH,
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
    "num_key_value_heads": 4, "head_dim": 8, "mlp_ratio": 2, "d_kv": 8, "d_ff": 48, "vocab_size": VOCABULARY,
}  # fmt: skip

LANGUAGE = ("text", "decoder", "encoder", "dit", "vlm")
"""Parts of a configuration that have a language model's sizes, by their names; the others have a vision tower's."""

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "depth", "layers")
WINDOWS = dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), WINDOW)
MARKS = ("_token_id", "_token_index", "_id", "_index")
FIXED = {
    "pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "image": IMAGE, "image_patch": IMAGE, "video": VIDEO,
    "audio": AUDIO,
}  # fmt: skip
"""The numbers of tokens; others, such as those around an image, are numbered from `FIRST_MARK`."""


def tiny_config(model_type: str, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of `model_type` with every known size small and `overrides` in their place.

    A part that `overrides` gives a `model_type` starts from that type's default. A callable is called for its value.
    """
    fields = _default(model_type, overrides)
    return CONFIG_MAPPING[model_type](**_shrunk(fields, overrides, TEXT, dict(FIXED)))


def _default(model_type: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The default of a type as plain data; parts that `overrides` gives another type have that type's default."""
    fields = CONFIG_MAPPING[model_type]().to_dict()
    for name, value in overrides.items():
        if isinstance(value, Mapping) and (kind := value.get("model_type")):
            fields[name] = _default(kind, value)
    return fields


def _shrunk(
    fields: Mapping[str, Any], overrides: Mapping[str, Any], sizes: Mapping[str, Any], tokens: dict[str, int]
) -> dict[str, Any]:
    """Plain data, parts within included; `tokens` are the numbers given to special tokens so far."""
    known = {**SHARED, **WINDOWS, **sizes, **_layers(fields)}
    small: dict[str, Any] = {}
    for name, value in fields.items():
        override = overrides.get(name, {})
        if name in FORGOTTEN:
            continue
        if isinstance(value, Mapping) and "model_type" in value and isinstance(override, Mapping):
            part = TEXT if any(word in name for word in LANGUAGE) else VISION
            small[name] = _part(value, override, part, tokens)
        elif name in overrides:
            continue
        elif mark := _mark(name, value):
            small[name] = tokens.setdefault(mark, FIRST_MARK + len(tokens) - len(FIXED))
        else:
            small[name] = _resized(value, known[name]) if name in known else value
    small = {**{name: value for name, value in overrides.items() if name not in small}, **small}
    return {name: value() if callable(value) else value for name, value in small.items() if value is not DROP}


def _part(
    fields: Mapping[str, Any], overrides: Mapping[str, Any], sizes: Mapping[str, Any], tokens: dict[str, int]
) -> Any:
    """A part as plain data; as a configuration where it has another type than its whole would give it."""
    small = _shrunk(fields, overrides, sizes, tokens)
    return CONFIG_MAPPING[small["model_type"]](**small) if "model_type" in overrides else small


def _resized(value: Any, size: Any) -> Any:
    """A size in the form of its default: a list stays one, and what is None the configuration derives again."""
    if value is None or size is DROP:
        return DROP
    if isinstance(size, list):
        return size
    if isinstance(value, (list, tuple)):
        return [size] * len(value)
    return type(value)(size) if isinstance(value, (int, float)) else size


def _mark(name: str, value: Any) -> str | None:
    """`image` for `image_token_id`, where that is the number of a token."""
    suffix = next((suffix for suffix in MARKS if name.endswith(suffix)), None)
    if suffix is None or isinstance(value, bool) or not isinstance(value, (int, list)):
        return None
    return name.removesuffix(suffix).strip("_")


def _layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers, and what is listed layer by layer, cut so that each kind of layer occurs twice."""
    depth_name = next((name for name in DEPTHS if isinstance(fields.get(name), int)), None)
    if depth_name is None:
        return {}
    depth = fields[depth_name]
    listed = {
        name: value for name, value in fields.items() if isinstance(value, list) and len(value) == depth
    }
    listed = {name: value for name, value in listed.items() if value and not isinstance(value[0], list)}
    cycles = {
        name: kinds for name, value in listed.items() if 1 < len(kinds := [*dict.fromkeys(value)]) < depth
    }
    length = max([3, *(2 * len(kinds) for kinds in cycles.values())])
    cut = {name: [*cycles.get(name, value)] * length for name, value in listed.items()}
    return {depth_name: length, **{name: value[:length] for name, value in cut.items()}}
