"""Clean activations by hook and head or neuron."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hooks import HookedVLM
from hooks.engine import head_results
from hooks.points import HookPoint


def activation_of(
    vlm: HookedVLM, read: Callable[[str], Float[Tensor, "..."]], hook: str, index: int | None
) -> Float[Tensor, "..."]:
    """A clean activation, of one head or neuron where an index is given.

    Args:
        vlm: the model it is of; per-head results are made from z by its own W_O.
        read: the stored activation of a hook point.
        hook: hook point.
        index: head or neuron.
    """
    point = vlm.hook_points[hook]
    if point.leaf != "hook_result":
        whole = read(hook)
        return whole if index is None else of_index(whole, point, index)
    out = vlm.module(point.module)
    z = read(hook.replace("hook_result", "hook_z"))
    if index is None:
        return head_results(out, z)
    if type(out) is torch.nn.Linear and not out.weight.is_meta:
        wide = torch.promote_types(z.dtype, torch.float32)
        weight = out.weight.unflatten(1, (z.shape[-2], -1))[:, index]
        return z.select(-2, index).to(wide) @ weight.T.to(wide)
    return head_results(out, z).select(-2, index)


def of_index(activation: Float[Tensor, "..."], point: HookPoint, index: int) -> Float[Tensor, "..."]:
    """The head or neuron of a whole activation."""
    axis = next(point.axes.index(name) for name in ("head", "kv_head", "d_mlp") if name in point.axes)
    return activation.select(axis, index)
