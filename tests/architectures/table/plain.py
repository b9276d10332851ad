"""Reading and writing a hook point with plain PyTorch hooks, placed here and knowing nothing of `hooks.engine`.

Attention is looked into by wrapping the function that transformers hands out; patterns are those of Hugging Face's own
eager attention, given the same queries, keys, values and mask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from hooks import HookedVLM
from hooks.anatomy import Slice
from hooks.points import HookPoint

SHIFT = 2.0
"""What is added to the scores of the first key."""
INSIDE = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")


@dataclass
class Attending:
    """One call of an attention function: what went in, what came out, and Hugging Face's own pattern of it."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    pattern: Tensor | None
    scale: float
    softcap: float | None


@dataclass
class Seen:
    """One forward pass: logits, first tensors in and out of every module, calls of attention by module."""

    logits: Float[Tensor, "batch pos vocab"]
    args: dict[str, tuple[tuple, dict[str, Any]]] = field(default_factory=dict)
    outs: dict[str, Any] = field(default_factory=dict)
    attended: dict[str, list[Attending]] = field(default_factory=dict)


def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch pos vocab"]:
    """One forward pass as it is."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def first(value: Any) -> Any:
    """A module's first output."""
    return value[0] if isinstance(value, (tuple, list)) else value


@torch.no_grad()
def look(model: Any, inputs: Mapping[str, Tensor], paths: set[str]) -> Seen:
    """One forward pass with everything kept that goes into and comes out of these modules."""
    seen = Seen(torch.empty(0))
    names = {module: path for path, module in model.named_modules()}

    def before(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            own = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            named = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            seen.args[path] = own, named
            return args, kwargs

        return hook

    def attended(module: nn.Module, call: Attending) -> Tensor:
        seen.attended.setdefault(names[module], []).append(call)
        return call.out

    handles = [model.get_submodule(p).register_forward_pre_hook(before(p), with_kwargs=True) for p in paths]
    handles += [model.get_submodule(p).register_forward_hook(keep_out(seen, p)) for p in paths]
    try:
        with attention_wrapped(attended):
            seen.logits = logits_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def keep_out(seen: Seen, path: str) -> Callable:
    """A forward hook that keeps what came out."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.outs[path] = output.clone()
        elif isinstance(output, (tuple, list)):
            seen.outs[path] = tuple(o.clone() if isinstance(o, Tensor) else o for o in output)
        else:
            seen.outs[path] = copy(output)

    return hook


@contextmanager
def attention_wrapped(act: Callable[[nn.Module, Attending], Tensor]) -> Iterator[None]:
    """Every call of an attention function gives out what `act` makes of it, meanwhile."""
    original, own = AttentionInterface.get_interface, threading.get_ident()

    def get_interface(self: Any, implementation: str, default: Callable) -> Callable:
        function = original(self, implementation, default)
        if threading.get_ident() != own:
            return function

        def wrapped(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            *args: Any,
            **kwargs: Any,
        ):
            result = function(module, query, key, value, attention_mask, *args, **kwargs)
            kwargs |= dict(zip(("scaling", "dropout"), args, strict=False))
            mask = attention_mask
            pattern = _eager_pattern(default, module, query, key, value, mask, kwargs)
            scale = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            call = Attending(query, key, value, first(result), pattern, float(scale), kwargs.get("softcap"))
            new = act(module, call)
            return (new, *result[1:]) if isinstance(result, tuple) else new

        return wrapped

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


def _eager_pattern(
    eager: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor | None:
    """What Hugging Face's eager attention looks at; None where the module's file has none."""
    if eager is None or kwargs.get("cu_seq_lens_q") is not None:
        return None
    n_query, n_key = query.shape[2], key.shape[2]
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        seen = torch.ones(n_query, n_key, dtype=torch.bool)
        mask = (seen.tril() if causal and n_query > 1 else seen)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min).to(query.dtype)
    kwargs = {"scaling": query.shape[-1] ** -0.5, "dropout": 0.0} | {
        k: v for k, v in kwargs.items() if v is not None
    }
    groups = query.shape[1] // key.shape[1]
    pattern = None
    for repeats in dict.fromkeys((1, groups)):  # a model's own may not know of grouped heads (Unlimited OCR)
        states = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        with suppress(Exception):
            _, pattern = eager(module, query, *states, mask[..., :n_key], **kwargs)
            break
    return pattern if isinstance(pattern, Tensor) and pattern.shape[-2:] == (n_query, n_key) else None


def heads_of(tensor: Tensor, split: Slice) -> Tensor:
    """The entries of the last axis that are heads, one by one."""
    index = _entries(split, tensor.shape[-1])
    return tensor[..., index].unflatten(-1, (split.heads, -1))


def _entries(split: Slice, width: int) -> Tensor:
    if split.length == split.width:
        return torch.arange(width)
    starts = torch.arange(split.groups) * split.width + split.start
    return (starts[:, None] + torch.arange(split.length)).flatten()


def coefficient(model: Any, expression: float | str) -> Tensor | float:
    """What an output is multiplied with before it is added, read off the model's parameters."""
    if not isinstance(expression, str):
        return expression
    owner, _, name = expression.removeprefix("tanh(").rstrip(")").rpartition(".")
    value = getattr(model.get_submodule(owner), name).detach()
    return value.tanh() if expression.startswith("tanh(") else value


def given(seen: Seen, path: str, key: str | None) -> Tensor:
    """What a module was given as its stream."""
    args, kwargs = seen.args[path]
    if key is not None and key in kwargs:
        return kwargs[key]
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


def read(vlm: HookedVLM, point: HookPoint, seen: Seen) -> Tensor | None:
    """The value of a point, from what plain hooks saw; None where they cannot tell."""
    if point.place == "attention":
        return _read_inside(point, seen)
    if point.place == "input":
        value = given(seen, point.module, point.key)
    elif point.place == "rest":
        value = first(seen.outs[point.module]) - given(seen, str(point.key), None)
    elif point.place == "result":
        z = heads_of(given(seen, point.module, None), point.split)  # type: ignore[arg-type]
        out: Any = vlm.model.get_submodule(point.module)
        weight = out.weight.T if hasattr(out, "nf") else out.weight
        heads = torch.einsum("...hd,mhd->...hm", z, weight.unflatten(1, (z.shape[-2], -1)))
        return heads * coefficient(vlm.model, point.coefficient)
    else:
        out = seen.outs[point.module]
        value = first(out if point.key is None else getattr(out, point.key))
        if point.coefficient != 1.0:
            value = value * coefficient(vlm.model, point.coefficient)
    value = value.movedim(0, 2) if point.moved else value
    return value if point.split is None else heads_of(value, point.split)


def _read_inside(point: HookPoint, seen: Seen) -> Tensor | None:
    calls = seen.attended.get(point.module, [])
    if not calls:
        return None
    call = calls[0] if len(calls) == 1 else _joined(calls)
    if point.leaf == "hook_rot_q":
        return call.query.transpose(1, 2)
    if point.leaf == "hook_rot_k":
        return call.key.transpose(1, 2)
    if point.leaf == "hook_v":
        return call.value.transpose(1, 2)
    if point.leaf == "hook_z":
        return call.out
    if point.leaf == "hook_pattern" or call.pattern is None:
        return call.pattern
    groups = call.query.shape[1] // call.key.shape[1]
    scores = call.query @ call.key.repeat_interleave(groups, dim=1).transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    return scores.masked_fill(call.pattern == 0, -torch.inf)


def _joined(calls: list[Attending]) -> Attending:
    """Windows of images that are handed over one by one, as one call: none looks at another."""
    query, key, value = (torch.cat([getattr(c, n) for c in calls], dim=2) for n in ("query", "key", "value"))
    patterns = [c.pattern for c in calls if c.pattern is not None]
    pattern = None
    if len(patterns) == len(calls):
        heads = [torch.block_diag(*(p[0, h] for p in patterns)) for h in range(patterns[0].shape[1])]
        pattern = torch.stack(heads)[None]
    out = torch.cat([c.out for c in calls], dim=1)
    return Attending(query, key, value, out, pattern, calls[0].scale, calls[0].softcap)


@torch.no_grad()
def written(vlm: HookedVLM, point: HookPoint, inputs: Mapping[str, Tensor], seen: Seen) -> Tensor | None:
    """Logits with the point's value negated (scores: those of the first key shifted); None where not told apart."""
    if point.place == "attention":
        return _written_inside(vlm, point, inputs, seen)
    model, module = vlm.model, vlm.model.get_submodule(point.module)
    if point.inplace:
        return _written_between(vlm, point, inputs, seen)
    if point.place == "input":
        handle = module.register_forward_pre_hook(_negate_input(point), with_kwargs=True)
    elif point.place == "rest":
        inside: list[Tensor] = []
        reader = model.get_submodule(str(point.key))
        handle = module.register_forward_hook(
            lambda m, args, out: _instead(out, 2 * inside[-1] - first(out)), prepend=True
        )
        other = reader.register_forward_pre_hook(lambda m, args: inside.append(args[0].clone()))
        try:
            return logits_of(model, inputs)
        finally:
            handle.remove()
            other.remove()
    elif point.place == "result":
        bias: Any = getattr(module, "bias", None)
        twice: Any = 0.0 if bias is None else 2 * bias
        handle = module.register_forward_hook(lambda m, args, out: twice - out)
    else:
        handle = module.register_forward_hook(_negate_output(point), prepend=True)
    try:
        return logits_of(model, inputs)
    finally:
        handle.remove()


def _negated(value: Tensor, point: HookPoint) -> Tensor:
    if point.split is None:
        return -value
    new = value.clone()
    index = _entries(point.split, value.shape[-1])
    new[..., index] = -new[..., index]
    return new


def _negate_input(point: HookPoint) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if point.key is not None and point.key in kwargs:
            return args, {**kwargs, point.key: _negated(kwargs[point.key], point)}
        return (_negated(args[0], point), *args[1:]), kwargs

    return hook


def _negate_output(point: HookPoint) -> Callable:
    def hook(module: nn.Module, args: tuple, out: Any) -> Any:
        if point.key is None:
            return _instead(out, _negated(first(out), point))
        field = getattr(out, point.key)
        setattr(out, point.key, _instead(field, _negated(first(field), point)))
        return out

    return hook


def _instead(out: Any, new: Tensor) -> Any:
    return type(out)((new, *out[1:])) if isinstance(out, (tuple, list)) else new


def _written_between(vlm: HookedVLM, point: HookPoint, inputs: Mapping, seen: Seen) -> Tensor | None:
    """A stream inside a block is negated by what the writer before it adds: minus twice the stream."""
    assert point.layer is not None
    block = vlm.anatomy.towers[point.tower].blocks[point.layer]
    index = next((i for i, w in enumerate(block.writers) if w.reader == point.module), 0)
    before = block.writers[index - 1] if index else None
    if before is None or before.rest or any(w.rest for w in block.writers):
        return None
    factor = coefficient(vlm.model, before.coefficient)
    if isinstance(factor, Tensor) and bool((factor.abs() < 1e-3).any()):
        return None
    stream = given(seen, point.module, point.key)

    def hook(module: nn.Module, args: tuple, out: Any) -> Any:
        own = first(out)
        return _instead(out, own - (2 * stream / factor).reshape(own.shape))

    handle = vlm.model.get_submodule(before.module).register_forward_hook(hook)
    try:
        return logits_of(vlm.model, inputs)
    finally:
        handle.remove()


def _written_inside(vlm: HookedVLM, point: HookPoint, inputs: Mapping, seen: Seen) -> Tensor | None:
    calls = seen.attended.get(point.module, [])
    if not calls or (point.leaf in INSIDE and any(call.pattern is None for call in calls)):
        return None
    module, n = vlm.model.get_submodule(point.module), 0

    def act(attending: nn.Module, call: Attending) -> Tensor:
        nonlocal n
        if attending is not module:
            return call.out
        n += 1
        return _edited(point.leaf, call, n == 1)

    with attention_wrapped(act):
        return logits_of(vlm.model, inputs)


def _edited(leaf: str, call: Attending, is_first: bool) -> Tensor:
    """What attention gives out when one of its tensors is changed, from Hugging Face's own pattern."""
    if leaf in ("hook_z", "hook_v", "hook_pattern"):
        return -call.out
    pattern = call.pattern
    assert pattern is not None
    groups = call.query.shape[1] // call.key.shape[1]
    if leaf == "hook_attn_scores":
        change = torch.zeros_like(pattern)
        change[..., 0] = SHIFT * is_first
    else:  # a negated query or key negates the scores
        scores = call.query @ call.key.repeat_interleave(groups, dim=1).transpose(2, 3) * call.scale
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        change = -2 * scores
    # of the pattern's weights and the share of a sink, whose score stays
    seen = pattern > 0
    weight = torch.where(seen, pattern.clamp(min=1e-38).log() + change, -torch.inf)
    sunk = (1 - pattern.sum(-1, keepdim=True)).clamp(min=1e-30)
    sunk = torch.where(sunk < 1e-5, torch.zeros_like(sunk), sunk).log()
    new = torch.cat([weight, sunk], dim=-1).softmax(-1)[..., :-1].nan_to_num(0.0)
    out = new.to(call.value.dtype) @ call.value.repeat_interleave(groups, dim=1)
    return out.transpose(1, 2).contiguous().reshape(call.out.shape)
