"""The anatomy of a model that does not run: its files are compared, its parameters frozen. Read off the module tree.

What is declared are the names and words that Hugging Face uses for one and the same part; a part that goes by another
name is left out, and its block keeps its address. A model that can run is watched instead (`hooks.anatomy.find`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hooks.anatomy.nouns import Anatomy, Block, Role, Site, Slice, Tower, Writer
from hooks.anatomy.towers import is_linear
from hooks.errors import FrankenlensError

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_CROSS = ("cross_attn", "encoder_attn")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_MIXER = ("linear_attn", "mamba", "mixer", "conv", "operator", "ssm", "temporal_block")
_QUERY, _KEY, _VALUE = ("q_proj", "query", "wq"), ("k_proj", "key", "wk"), ("v_proj", "value", "wv")
_FUSED = ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv")
_OUT = ("o_proj", "out_proj", "proj", "dense", "c_proj", "wo", "projection_layer")
_LAST = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "w2", "proj_down", "linear_fc2")
_FINAL_NORM = ("norm", "final_layernorm", "ln_f", "embedding_norm", "final_layer_norm", "norm_f")
_PROJECTOR = ("multi_modal_projector", "connector", "mm_projector", "aligner", "embed_vision")


def declared_anatomy(model: PreTrainedModel) -> Anatomy:
    """Read the anatomy off the module tree; nothing is run, so weights may be on the meta device.

    Raises:
        FrankenlensError: no stack of blocks is found.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    decoder, encoder = _decoder(model), _encoder(model)
    text = _tower(decoder, names, model.config.get_text_config())
    if text is None:
        raise FrankenlensError(f"{type(model).__name__}: no stack of transformer blocks in {names[decoder]}.")
    vision = None if encoder is None else _tower(encoder, names, getattr(encoder, "config", model.config))
    unembed = model.get_output_embeddings()
    norm = _child(decoder, _FINAL_NORM)
    projector = _projector(model, encoder, names) if vision is not None else ("", None, "")
    mergers = enumerate(getattr(encoder, "deepstack_merger_list", ()) if vision is not None else ())
    return Anatomy(
        text,
        vision or Tower("", ()),
        names[model.get_input_embeddings()],
        "" if norm is None else names[norm],
        "" if unembed is None else names[unembed],
        *projector,
        {layer: names[merger] for layer, merger in mergers},
        entry=names[decoder],
        entry_key="inputs_embeds",
    )


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder: Any = model.get_decoder()
    return model.base_model if decoder is model else decoder


def _encoder(model: PreTrainedModel) -> nn.Module | None:
    try:
        encoder: Any = model.get_encoder(modality="image")
    except (AttributeError, ValueError, KeyError):
        return None
    return None if encoder in (model, model.base_model) else encoder


def _projector(
    model: PreTrainedModel, encoder: Any, names: dict[nn.Module, str]
) -> tuple[str, str | None, str]:
    projector = _child(model.base_model, _PROJECTOR)
    merger: Any = getattr(encoder, "merger", None)
    if projector is not None:
        return names[projector], None, names[projector]
    return ("", None, "") if merger is None else (names[encoder], "pooler_output", names[merger])


def _tower(root: nn.Module, names: dict[nn.Module, str], config: Any) -> Tower | None:
    lists = [
        m
        for m in root.modules()
        if isinstance(m, nn.ModuleList)
        and len(m)
        and (_child(m[0], _ATTENTION + _MIXER) is not None or sum(map(is_linear, m[0].modules())) >= 4)
    ]
    if not lists:
        return None
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    stack = max(lists, key=len)
    blocks = tuple(_block(block, names, heads if isinstance(heads, int) else None) for block in stack)
    packed = "cu_seqlens" in inspect.signature(stack[0].forward).parameters
    out = blocks[0].site and blocks[0].site.out
    width = _sizes(root.get_submodule(out.removeprefix(f"{names[root]}.")))[1] if out else 0
    return Tower(names[root], blocks, packed, width=width, ndim=2 if packed else 3)


def _block(block: nn.Module, names: dict[nn.Module, str], heads: int | None) -> Block:
    attention, mlp, mixer = _child(block, _ATTENTION), _child(block, _MLP), _child(block, _MIXER)
    norms = [names[m] for m in block.children() if "norm" in type(m).__name__.lower()]
    before = norms if len(norms) == 2 else []
    writers: list[Writer] = []
    site = None
    if attention is not None:
        site = _site(attention, names, heads)
        writers.append(_writer("attn", attention, names, before[:1], site))
    elif mixer is not None:
        writers.append(_writer("mixer", mixer, names, before[:1]))
    if (cross := _child(block, _CROSS)) is not None:
        writers.append(_writer("cross_attn", cross, names, []))
    if mlp is not None:
        last = next((c for name in _LAST if is_linear(c := getattr(mlp, name, nn.Identity()))), None)
        experts = any(value.ndim == 3 for value in mlp.parameters()) or hasattr(mlp, "experts")
        role: Role = "moe" if experts else "mlp"
        own = None if last is None or experts else names[last]
        writers.append(_writer(role, mlp, names, before[1:], last=own))
    if before and len(writers) == 2:  # each behind a norm of its own: one reads what the other has written
        writers = [replace(writer, state=state) for state, writer in enumerate(writers)]
    return Block(names[block], None, tuple(writers), () if site is None else (site,))


def _writer(
    role: Role,
    module: nn.Module,
    names: dict[nn.Module, str],
    reader: list[str],
    site: Site | None = None,
    last: str | None = None,
) -> Writer:
    path = names[module]
    return Writer(role, path, path, reader=reader[0] if reader else None, site=site, last=last)


def _site(attention: nn.Module, names: dict[nn.Module, str], heads: int | None) -> Site | None:
    out = _child(attention, _OUT)
    if out is None or not heads or not is_linear(out):
        return None
    width = _sizes(out)[0]
    d = width // heads
    rotary = "position_embeddings" in inspect.signature(attention.forward).parameters
    fused = _child(attention, _FUSED)
    separate = [_child(attention, kind) for kind in (_QUERY, _KEY, _VALUE)]
    if fused is not None:
        total = _sizes(fused)[1]
        n_kv = max(1, (total // d - heads) // 2)
        starts = ((heads, 0), (n_kv, heads * d), (n_kv, (heads + n_kv) * d))
        parts = [Slice(names[fused], n, 1, start, n * d, total) for n, start in starts]
    elif None not in separate:
        n_kv = _sizes(separate[1])[1] // d
        parts = [
            Slice(names[m], n, length=_sizes(m)[1], width=_sizes(m)[1])
            for m, n in zip(separate, (heads, n_kv, n_kv), strict=True)
        ]
    else:
        return Site(names[attention], heads, heads, d, d, out=names[out], rotary=rotary)
    q, k, v = parts
    return Site(names[attention], heads, n_kv, d, d, q, k, v, names[out], rotary)


def _sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)  # Conv1D of GPT-2: [in, out]


def _child(module: nn.Module, candidates: Iterable[str]) -> Any:
    children = dict(module.named_children())
    return next((children[name] for name in candidates if name in children), None)
