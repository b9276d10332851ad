"""Attention of a segment of tokens whose earlier keys and values are those of a clean run.

Lanes, copies of the batch under different interventions, share the prefix, and attend to it without copying it where
the kernel allows (`interp.sweep.joined`). Elsewhere only short segments do, and long ones copy it for SDPA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from hooks import HookedVLM
from hooks.linears import by_onednn
from interp.sweep.joined import can_join, joined

_NAME = "frankenlens_segment"
SHORT = 32
"""Segments up to this many tokens attend densely to the shared prefix; longer ones copy it and use SDPA."""

Tap = Callable[[str, Tensor], Tensor]


@dataclass
class SegmentContext:
    """What the attention of one layer needs beyond its own segment.

    Attributes:
        keys, values: of the clean run before the segment, rotary embedding applied.
        visible: which keys (prefix, then segment) each query may look at; the first axis may be 1, the rows of the
            batch, or all lanes.
        causal: whether `visible` is the plain lower triangle: nothing before a query is hidden from it.
        tap: shows and edits `hook_rot_q`, `hook_rot_k`, `hook_v` [lane pos head d_head], `hook_attn_scores` and
            `hook_pattern` [lane head query key]; None where nothing inside is touched.
        dense: whether scores and pattern must exist.
        wanted: the queries whose output is used, all if None; the others' is 0.
    """

    keys: Float[Tensor, "batch kv_head prefix d_head"]
    values: Float[Tensor, "batch kv_head prefix d_value"]
    visible: Bool[Tensor, "_ 1 query key"]
    causal: bool = False
    tap: Tap | None = None
    dense: bool = False
    wanted: Int[Tensor, " wanted"] | None = None


@dataclass
class Segment:
    """Where the attention of a layer finds its context; set before each call of its block."""

    context: SegmentContext | None = None


def segment_of(module: Any) -> Segment:
    """That of an attention module, inside `segments_on`."""
    return module.config._frankenlens_segment


@dataclass(frozen=True, eq=False)
class Special:
    """What some models do to their scores: a soft cap on them, and a score a head that takes its share of the softmax
    and gives nothing (gpt-oss)."""

    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None

    @property
    def plain(self) -> bool:
        """Neither."""
        return self.softcap is None and self.sinks is None


@contextmanager
def segments_on(vlm: HookedVLM, modules: Sequence[Any]) -> Iterator[None]:
    """Send these attention modules here, as their `segment_of` says, until the context ends.

    The blocks' linear layers meanwhile multiply as fast as the processor can (`hooks.linears`).

    Meanwhile the model's blocks are called one by one, so no other thread or task may run it.
    """
    blocks = [vlm.module(block.path) for block in vlm.anatomy.text.blocks]
    with vlm.exclusive("a sweep"), by_onednn(blocks):
        originals = [module.config for module in modules]
        try:
            for module, original in zip(modules, originals, strict=True):
                shim = copy.copy(original)
                shim._attn_implementation_internal = _NAME
                shim._frankenlens_segment = Segment()
                module.config = shim
            yield
        finally:
            try:
                _send_back(modules, originals)
            except KeyboardInterrupt:
                _send_back(modules, originals)
                raise


def _send_back(modules: Sequence[Any], originals: Sequence[Any]) -> None:
    for module, original in zip(modules, originals, strict=True):
        module.config = original


def segment_attention(
    module: Any,
    query: Float[Tensor, "lane head query d_head"],
    key: Float[Tensor, "lane kv_head query d_head"],
    value: Float[Tensor, "lane kv_head query d_value"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "lane query head d_value"], None]:
    """The attention function that transformers calls for a segment; the mask is the context's own."""
    context = segment_of(module).context
    assert context is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if context.tap is not None:
        query = context.tap("hook_rot_q", query.transpose(1, 2)).transpose(1, 2)
        key = context.tap("hook_rot_k", key.transpose(1, 2)).transpose(1, 2)
        value = context.tap("hook_v", value.transpose(1, 2)).transpose(1, 2)
    special = Special(softcap, s_aux)
    if context.dense or not special.plain:
        out = _with_copies(context, query, key, value, scale, True, special)
        return out.transpose(1, 2).contiguous(), None
    some, visible = query, context.visible
    if context.wanted is not None:
        some, visible = query[:, :, context.wanted], visible[:, :, context.wanted]
    if context.keys.shape[2] and can_join(query, value):
        before = context.keys, context.values
        out = joined(some, (key, value), before, visible, context.causal, scale)
    elif some.shape[2] <= SHORT:
        out = _shared_prefix(context, some, key, value, visible, scale)
    else:
        out = _with_copies(replace(context, visible=visible), some, key, value, scale, dense=False)
    if context.wanted is not None:
        whole = query.new_zeros(*query.shape[:3], value.shape[-1])
        whole[:, :, context.wanted] = out
        out = whole
    return out.transpose(1, 2).contiguous(), None


def _with_copies(
    context: SegmentContext,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dense: bool,
    special: Special = Special(),
) -> Float[Tensor, "lane head query d_value"]:
    rows, lanes = context.keys.shape[0], query.shape[0]
    if context.keys.shape[2]:
        key, value = _after(context.keys, key), _after(context.values, value)
    visible = context.visible
    if visible.shape[0] not in (1, lanes):
        visible = visible.repeat(lanes // rows, 1, 1, 1)
    groups = query.shape[1] // key.shape[1]
    if not dense:
        causal = context.causal and context.keys.shape[2] == 0 and query.shape[2] == key.shape[2]
        mask = None if causal else visible
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    if special.softcap is not None:
        scores = torch.tanh(scores / special.softcap) * special.softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if context.tap is not None:
        scores = context.tap("hook_attn_scores", scores)
    if special.sinks is None:
        pattern = _softmax(scores)
    else:
        sunk = special.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores)
        pattern = _softmax(torch.cat([scores, sunk], dim=-1))[..., :-1]
    pattern = pattern.to(query.dtype)
    if context.tap is not None:
        pattern = context.tap("hook_pattern", pattern)
    return pattern @ value


def _after(
    prefix: Float[Tensor, "batch kv_head prefix d_head"], own: Float[Tensor, "lane kv_head query d_head"]
) -> Float[Tensor, "lane kv_head key d_head"]:
    """The prefix once per lane, and the segment behind it; every number is copied once."""
    lanes, heads, n, d_head = own.shape
    rows, _, before, _ = prefix.shape
    whole = own.new_empty(lanes // rows, rows, heads, before + n, d_head)
    whole[:, :, :, :before] = prefix
    whole[:, :, :, before:] = own.reshape(lanes // rows, rows, heads, n, d_head)
    return whole.view(lanes, heads, before + n, d_head)


def _shared_prefix(
    context: SegmentContext, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float
) -> Float[Tensor, "lane head query d_value"]:
    """The lanes of one row are further queries to the one prefix; each sees, besides, only its own segment."""
    (rows, kv_heads, prefix, d_head), (lanes, heads, n) = context.keys.shape, query.shape[:3]
    d_value = value.shape[-1]  # latent attention: not that of the keys
    copies, groups, own = lanes // rows, heads // kv_heads, key.shape[2]
    q = (query * scale).reshape(copies, rows, kv_heads, groups * n, d_head).permute(1, 2, 0, 3, 4)
    k = key.reshape(copies, rows, kv_heads, own, d_head).permute(1, 2, 0, 3, 4)
    v = value.reshape(copies, rows, kv_heads, own, d_value).permute(1, 2, 0, 3, 4)
    far = q.reshape(rows, kv_heads, copies * groups * n, d_head) @ context.keys.transpose(2, 3)
    far = far.reshape(rows, kv_heads, copies, groups, n, prefix)
    near = (q @ k.transpose(-2, -1)).reshape(rows, kv_heads, copies, groups, n, own)
    if visible.shape[0] == lanes:
        visible = visible.unflatten(0, (copies, rows)).permute(1, 2, 0, 3, 4)[:, :, :, None]
    else:
        visible = visible[:, :, None, None]
    near.masked_fill_(~visible[..., prefix:], -torch.inf)
    if not context.causal:
        far.masked_fill_(~visible[..., :prefix], -torch.inf)
    pattern = _softmax(torch.cat([far, near], dim=-1), guarded=not context.causal).to(query.dtype)
    out = pattern[..., :prefix].reshape(rows, kv_heads, copies * groups * n, prefix) @ context.values
    out = out.reshape(rows, kv_heads, copies, groups * n, d_value)
    out = out + pattern[..., prefix:].reshape(rows, kv_heads, copies, groups * n, own) @ v
    out = out.reshape(rows, kv_heads, copies, groups, n, d_value)
    return out.permute(2, 0, 1, 3, 4, 5).reshape(lanes, heads, n, d_value)


def _softmax(
    scores: Float[Tensor, "*lead query key"], guarded: bool = True
) -> Float[Tensor, "*lead query key"]:
    """In fp32 at least; a query that may look at nothing (left padding) looks at nothing."""
    pattern = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if not guarded:
        return pattern
    return pattern.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)


AttentionInterface.register(_NAME, segment_attention)
