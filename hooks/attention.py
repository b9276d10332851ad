"""Attention seen from inside, through the attention interface of transformers.

Only the attention modules that are hooked are sent here: each gets, for as long as the hooks are on, a copy of its
config that names this implementation. All other layers run the user's own setting, untouched.
Scores and pattern are computed only where something reads or writes them; otherwise the user's implementation runs.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooks.anatomy.precise import widened
from hooks.errors import FrankenlensError
from hooks.inert import stays

_NAME = "frankenlens"
# transformers hands a packed vision tower's windows over in one call only where the name contains "flash".
_PACKED_NAME = "frankenlens_flash"
IN_FLOAT32 = "hook_in_float32"
"""Of proofs alone: [3 batch pos head d_head], attention with its scores, the user's own, and the sizes summed."""
_UNSUPPORTED = ("position_bias", "sinks", "cache")

Apply = Callable[[str, Tensor], Tensor]


class _StandIn(str):
    """Our name, by which transformers looks our function up, and equal to the user's wherever a model compares it.

    Models that choose keys for each query hand them on as a mask to "sdpa" and "eager", and to others as numbers.
    """

    _users: str

    def __new__(cls, users: str) -> "_StandIn":
        """Arguments: the name of the user's implementation."""
        own = super().__new__(cls, _NAME)
        own._users = users
        return own

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self._users

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class AttentionTap:
    """What the hooks of one attention module want: the leaves in use and a function that runs them on a tensor."""

    def __init__(self, leaves: Callable[[], frozenset[str]], apply: Apply, packed: bool) -> None:
        self._leaves, self.apply, self.packed = leaves, apply, packed
        self.implementation = "sdpa"

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves in use now."""
        return self._leaves()

    @property
    def dense(self) -> bool:
        """Whether scores or pattern must exist."""
        return bool(self.leaves & {"hook_attn_scores", "hook_pattern"})

    def on_heads(
        self, leaf: str, states: Float[Tensor, "batch head pos d_head"]
    ) -> Float[Tensor, "batch head pos d_head"]:
        """Run the hooks of `leaf` on states laid out as [batch pos head d_head] (packed: [patch head d_head])."""
        if leaf not in self.leaves:
            return states
        seen = states.transpose(1, 2)
        new = self.apply(leaf, seen[0] if self.packed else seen)
        return (new[None] if self.packed else new).transpose(1, 2)

    def on_out(
        self, leaf: str, out: Float[Tensor, "batch pos head d_value"]
    ) -> Float[Tensor, "batch pos head d_value"]:
        """Run the hooks of `leaf` on what attention gives out (packed: [patch head d_head])."""
        if leaf not in self.leaves:
            return out
        new = self.apply(leaf, out[0] if self.packed else out)
        return new[None] if self.packed else new

    def on_square(
        self, leaf: str, square: Float[Tensor, "batch head q k"]
    ) -> Float[Tensor, "batch head q k"]:
        """Run the hooks of `leaf` on scores or pattern (packed: [head query key])."""
        if leaf not in self.leaves:
            return square
        new = self.apply(leaf, square[0] if self.packed else square)
        return new[None] if self.packed else new


@contextmanager
def tapped(module: Any, tap: AttentionTap) -> Iterator[None]:
    """Send this one attention module through `tap` for the length of the context."""
    original = module.config
    if hasattr(original, "_frankenlens_tap"):
        raise FrankenlensError(
            "this attention module is hooked through another HookedVLM; use one per model."
        )
    shim = copy.copy(original)
    tap.implementation = original._attn_implementation or "eager"
    flash = tap.packed or "flash" in tap.implementation
    shim._attn_implementation_internal = _PACKED_NAME if flash else _StandIn(tap.implementation)
    shim._frankenlens_tap = tap
    stays(shim, original)
    try:
        module.config = shim
        yield
    finally:
        module.config = original


def hooked_attention(
    module: Any,
    query: Float[Tensor, "batch head q d_head"],
    key: Float[Tensor, "batch kv_head k d_head"],
    value: Float[Tensor, "batch kv_head k d_value"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Float[Tensor, "batch q head d_value"], Tensor | None]:
    """The attention function that transformers calls for a tapped module."""
    tap: AttentionTap = module.config._frankenlens_tap
    query, key = tap.on_heads("hook_rot_q", query), tap.on_heads("hook_rot_k", key)
    value = tap.on_heads("hook_v", value)
    given = (module, query, key, value, attention_mask, scaling, dropout, kwargs)
    if IN_FLOAT32 in tap.leaves:
        tap.apply(IN_FLOAT32, _in_float32(tap, *given))
        # where scores are large, a key of no weight could be hidden or seen wrongly, and nothing would show it
        tap.apply(IN_FLOAT32, _in_float32(tap, module, torch.zeros_like(query), *given[2:]))
    result: Any = (_dense if tap.dense else _as_the_user_set_it)(tap, *given)
    return tap.on_out("hook_z", result[0]), *result[1:]


def _dense(
    tap: AttentionTap,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention with its scores and its pattern as tensors."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise FrankenlensError(
                f"{type(module).__name__} uses {name!r}: its scores and pattern cannot be hooked."
            )
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scale
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    scores = _mask(tap, module, scores, attention_mask, kwargs)
    scores = tap.on_square("hook_attn_scores", scores)
    if (sinks := kwargs.get("s_aux")) is not None:  # a score a head that takes its share and gives nothing
        sunk = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        pattern = torch.softmax(torch.cat([scores, sunk], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    else:
        pattern = torch.softmax(scores, dim=-1, dtype=torch.float32)
    pattern = pattern.to(query.dtype)
    # A query that may look at nothing (left padding) looks at nothing; softmax alone would make it NaN.
    pattern = pattern.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    pattern = tap.on_square("hook_pattern", pattern)
    dropped = nn.functional.dropout(pattern, p=dropout, training=module.training)
    out = dropped @ value.repeat_interleave(groups, dim=1)
    return out.transpose(1, 2).contiguous(), pattern if tap.implementation == "eager" else None


@torch.no_grad()
def _in_float32(tap: AttentionTap, module: Any, query, key, value, *rest: Any) -> Float[Tensor, "3 ..."]:
    """Attention with its scores beside the user's own, both on these queries, keys and values in float32.

    In half precision a score of 60 is right to a quarter, and with it every probability: nothing could be told apart.
    Where the user's kernel knows no float32, it runs in its own precision, and so is what is returned.
    """
    silent = AttentionTap(frozenset, tap.apply, tap.packed)
    silent.implementation = tap.implementation
    q, k, v, *others = widened((query, key, value, *rest))
    dense = _dense(silent, module, q, k, v, *others)[0]
    try:
        own = _as_the_user_set_it(silent, module, q, k, v, *others)[0]
        size = _as_the_user_set_it(silent, module, q, k, v.abs(), *others)[0]
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except (RuntimeError, TypeError, ValueError):
        own = _as_the_user_set_it(silent, module, query, key, value, *rest)[0]
        size = _as_the_user_set_it(silent, module, query, key, value.abs(), *rest)[0]
    return torch.stack([dense.to(own.dtype), own, size])


def _mask(tap: AttentionTap, module: nn.Module, scores: Tensor, mask: Tensor | None, kwargs: dict) -> Tensor:
    """Apply whatever mask the user's implementation was given; what is hidden becomes -inf, as in TransformerLens."""
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        mask = mask[..., : scores.shape[-1]]
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        return (scores + mask.masked_fill(hidden, 0.0).to(scores.dtype)).masked_fill(hidden, -torch.inf)
    return scores.masked_fill(~_visible(tap, module, scores, mask, kwargs), -torch.inf)


def _visible(
    tap: AttentionTap, module: nn.Module, scores: Tensor, mask: Tensor | None, kwargs: dict
) -> Bool[Tensor, "#batch #head #q k"]:
    n_query, n_key = scores.shape[-2:]
    query = torch.arange(n_query, device=scores.device)[:, None]
    key = torch.arange(n_key, device=scores.device)[None, :]
    if (starts := kwargs.get("cu_seq_lens_q")) is not None:
        return (_window_of(starts, query) == _window_of(starts, key))[None, None]
    if mask is not None and mask.ndim == 4:
        return mask[..., :n_key]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    flash = "flash" in tap.implementation
    visible = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device)
    if is_causal and n_query > 1 and tap.implementation != "eager":
        # SDPA's causal mask is aligned to the first key, flash attention's to the last one.
        offset = n_key - n_query if flash else 0
        visible = key <= query + offset
    if flash and kwargs.get("sliding_window"):
        visible = visible & (key > query + n_key - n_query - kwargs["sliding_window"])
    return visible[None, None] if mask is None else visible & mask[:, None, None, -n_key:].bool()


def _window_of(starts: Int[Tensor, " boundary"], index: Int[Tensor, "a b"]) -> Int[Tensor, "a b"]:
    return torch.bucketize(index, starts.to(index.device, index.dtype), right=True)


def _as_the_user_set_it(tap, module, query, key, value, mask, scaling, dropout, kwargs):
    """Run the implementation that the user's config names, window by window where the tower is packed."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(tap.implementation, eager)
    packing = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    if not tap.packed or "flash" in tap.implementation:
        return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    kwargs = {name: given for name, given in kwargs.items() if name not in packing}
    windows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outs = [
        function(module, *states, mask, scaling=scaling, dropout=dropout, **kwargs)[0] for states in windows
    ]
    return torch.cat(outs, dim=1), None


AttentionInterface.register(_NAME, hooked_attention)
AttentionInterface.register(_PACKED_NAME, hooked_attention)
