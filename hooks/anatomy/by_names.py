"""Anatomy: where one Hugging Face model keeps its blocks, attention, MLPs, norms, projector and unembedding.

Found from the module tree. What is declared are the names that Hugging Face uses for one and the same part; what
is found is proved on the very model by `hooks.selfcheck`.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from hooks.errors import FrankenlensError

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn")
_QUERY, _KEY, _VALUE = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")
_FUSED = ("qkv",)
_OUT = ("o_proj", "out_proj", "proj", "dense")
_FINAL_NORM = ("norm", "final_layernorm", "ln_f")
_PROJECTOR = ("multi_modal_projector", "connector")


@dataclass(frozen=True)
class Block:
    """Module paths and sizes of one transformer block. `qkv` holds three paths, or the one path of a fused layer."""

    path: str
    attention: str
    qkv: tuple[str, ...]
    out: str
    mlp: str
    mlp_out: str
    pre_norm: str
    mid_norm: str
    n_heads: int
    n_kv_heads: int
    d_head: int
    rotary: bool


@dataclass(frozen=True)
class Tower:
    """A stack of blocks. `packed` towers run on [patch, d] without a batch axis."""

    path: str
    blocks: tuple[Block, ...]
    packed: bool


@dataclass(frozen=True)
class Anatomy:
    """Where everything is. `projector_key` names the field of the module's output, None for a plain tensor."""

    text: Tower
    vision: Tower
    embed: str
    final_norm: str
    unembed: str
    projector: str
    projector_key: str | None
    projector_weights: str
    deepstack: tuple[str, ...]


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Read the anatomy off the module tree.

    Raises:
        FrankenlensError: a part is not where any known architecture keeps it; the message names the part.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    base = model.base_model
    decoder = model.get_decoder()
    encoder = model.get_encoder(modality="image")
    if decoder is model or encoder in (model, base):
        _refuse(model, "a text decoder and an image encoder")
    unembed = model.get_output_embeddings()
    if unembed is None:
        _refuse(model, "an unembedding (get_output_embeddings)")
    heads = model.config.get_text_config()
    text = _tower(model, decoder, names, heads.num_attention_heads)
    vision_config = getattr(encoder, "config", model.config)
    n_vision = getattr(vision_config, "num_attention_heads", None) or getattr(
        vision_config, "num_heads", None
    )
    vision = _tower(model, encoder, names, n_vision)
    projector = _child(base, _PROJECTOR)
    merger: Any = getattr(encoder, "merger", None)
    if projector is not None:
        where = (names[projector], None, names[projector])
    elif merger is not None:
        where = (names[encoder], "pooler_output", names[merger])
    else:
        _refuse(model, f"a projector ({', '.join(_PROJECTOR)} or a merger in the vision tower)")
    norm = _child(decoder, _FINAL_NORM)
    if norm is None:
        _refuse(model, f"the final norm ({', '.join(_FINAL_NORM)})")
    return Anatomy(
        text,
        vision,
        names[model.get_input_embeddings()],
        names[norm],
        names[unembed],
        where[0],
        where[1],
        where[2],
        tuple(names[merger] for merger in getattr(encoder, "deepstack_merger_list", ())),
    )


def _tower(
    model: PreTrainedModel, root: nn.Module, names: dict[nn.Module, str], n_heads: int | None
) -> Tower:
    lists = [
        m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) and _child(m[0], _ATTENTION)
    ]
    if not lists:
        _refuse(model, f"transformer blocks with attention in {names[root]}")
    blocks = tuple(_block(model, block, names, n_heads) for block in max(lists, key=len))
    packed = "cu_seqlens" in inspect.signature(max(lists, key=len)[0].forward).parameters
    return Tower(names[root], blocks, packed)


def _block(
    model: PreTrainedModel, block: nn.Module, names: dict[nn.Module, str], n_heads: int | None
) -> Block:
    attention, mlp = _child(block, _ATTENTION), _child(block, _MLP)
    if attention is None or mlp is None:
        _refuse(model, f"attention and MLP of {names[block]}")
    out = _child(attention, _OUT)
    separate = [_child(attention, kind) for kind in (_QUERY, _KEY, _VALUE)]
    fused = _child(attention, _FUSED)
    qkv = [fused] if fused is not None else separate
    linears = [m for m in mlp.children() if hasattr(m, "in_features")]
    norms = [m for m in block.children() if "norm" in type(m).__name__.lower()]
    if out is None or None in qkv or not linears or len(norms) != 2 or not n_heads:
        _refuse(model, f"q/k/v/output projections, MLP and two pre-norms of {names[block]}")
    d_head = out.in_features // n_heads
    n_kv = n_heads if fused is not None else qkv[1].out_features // d_head
    return Block(
        path=names[block],
        attention=names[attention],
        qkv=tuple(names[m] for m in qkv),
        out=names[out],
        mlp=names[mlp],
        mlp_out=names[linears[-1]],
        pre_norm=names[norms[0]],
        mid_norm=names[norms[1]],
        n_heads=n_heads,
        n_kv_heads=n_kv,
        d_head=d_head,
        rotary="position_embeddings" in inspect.signature(attention.forward).parameters,
    )


def _child(module: nn.Module, candidates: Iterable[str]) -> Any:
    children = dict(module.named_children())
    return next((children[name] for name in candidates if name in children), None)


def _refuse(model: PreTrainedModel, what: str) -> NoReturn:
    raise FrankenlensError(
        f"{type(model).__name__}: cannot find {what} in its module tree. Supported and tested: Qwen2-VL, Qwen2.5-VL, "
        "Qwen3-VL, LLaVA, SmolVLM, Idefics3; other architectures open"
        " when their parts carry Hugging Face's usual names."
    )
