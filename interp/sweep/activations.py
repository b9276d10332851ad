"""Clean activations by hook and head, neuron or expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from hooks import HookedVLM
from hooks.engine import as_added, head_results
from hooks.experts import expert_contribution
from hooks.plain import plain_weight
from hooks.points import HookPoint

INDEXED = ("head", "kv_head", "d_mlp", "expert")
"""Axes that an index counts along."""


def kept_for(vlm: HookedVLM, hooks: Iterable[str]) -> list[str]:
    """The hook points to keep in a run for these to be made again: results of heads and experts from smaller ones.

    A head's result is made of z; an expert's contribution of what the experts are given and the router's weights.
    """
    names: dict[str, None] = {}
    for hook in hooks:
        experts = f"{hook.removesuffix('hook_expert_out')}hook_expert_in"
        if hook.endswith("hook_expert_out") and experts in vlm.hook_points:
            names |= {experts: None, experts.replace("expert_in", "router_weights"): None}
        else:
            names[hook.replace("hook_result", "hook_z")] = None
    return list(names)


def activation_of(
    vlm: HookedVLM, read: Callable[[str], Float[Tensor, "..."]], hook: str, index: int | None
) -> Float[Tensor, "..."]:
    """A clean activation, of one head, neuron or expert where an index is given.

    Args:
        vlm: the model it is of; results are made from z by its own W_O, contributions by its own experts.
        read: the stored activation of a hook point, of those that `kept_for` names.
        hook: hook point.
        index: head, neuron or expert.
    """
    point = vlm.hook_points[hook]
    if point.leaf == "hook_expert_out" and kept_for(vlm, [hook]) != [hook]:
        return _contribution(vlm, read, point, index)
    if point.leaf != "hook_result":
        whole = read(hook)
        return whole if index is None else of_index(whole, point, index)
    out = vlm.module(point.module)
    z = read(hook.replace("hook_result", "hook_z"))
    if index is None:
        return as_added(vlm.model, point, head_results(out, z))
    if (weight := plain_weight(out)) is not None:
        wide = torch.promote_types(z.dtype, torch.float32)
        own = weight.to(z.device).unflatten(1, (z.shape[-2], -1))[:, index]
        return as_added(vlm.model, point, z.select(-2, index).to(wide) @ own.T.to(wide))
    return as_added(vlm.model, point, head_results(out, z)).select(-2, index)


def _contribution(
    vlm: HookedVLM, read: Callable[[str], Float[Tensor, "..."]], point: HookPoint, index: int | None
) -> Float[Tensor, "..."]:
    hidden, weights = (read(name) for name in kept_for(vlm, [point.name]))
    assert point.experts is not None
    flat, dense = hidden.flatten(0, -2), weights.flatten(0, -2)
    own = expert_contribution(vlm.module(point.module), point.experts, flat, dense, index)
    return own.unflatten(0, hidden.shape[:-1])


def of_index(activation: Float[Tensor, "..."], point: HookPoint, index: int) -> Float[Tensor, "..."]:
    """The head, neuron or expert of a whole activation."""
    axis = next(point.axes.index(name) for name in INDEXED if name in point.axes)
    return activation.select(axis, index)
