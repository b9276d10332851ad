"""Proofs, on the model that was opened, that points of experts are what they say they are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.opened import Opened


@torch.no_grad()
def unproved_contributions(
    vlm: Opened, inputs: Any, live: Collection[str], bare: Float[Tensor, "batch pos vocab"], allowed: float
) -> dict[str, str]:
    """The points of what experts contribute that do not hold, with the reason.

    They must sum to what the experts give out, and written back must leave the logits as they are. All layers are shown
    in one forward, one at a time, because each holds as many streams as there are experts.

    Args:
        vlm: the opened model.
        inputs: what it is run on.
        live: points with a gradient; an expert's output has one where its weight has.
        bare: the model's own logits.
        allowed: how far they may move.
    """
    points = {name: point for name, point in vlm.hook_points.items() if point.place == "expert_out"}
    if not points:
        return {}
    sums: dict[str, Tensor] = {}
    outs: dict[str, Tensor] = {}

    def write_back(activation: Tensor, hook: Any) -> Tensor:
        sums[hook.name] = activation.double().sum(-2)
        return activation.clone()

    handles = []
    for name, point in points.items():

        def keep(module: Any, args: tuple, output: Tensor, name: str = name) -> None:
            outs[name] = output

        handles.append(vlm.module(point.module).register_forward_hook(keep))
    try:
        with vlm.hooks([(name, write_back) for name in points]):
            logits = vlm.model(**inputs, use_cache=False).logits
    except torch.OutOfMemoryError:  # says nothing about a point
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        return dict.fromkeys(points, why)
    finally:
        for handle in handles:
            handle.remove()
    moved = (logits - bare).abs().max().item()
    if not moved <= allowed:
        return dict.fromkeys(points, f"writing its own value back moved the logits by {moved:.2e}.")
    found: dict[str, str] = {}
    for name, point in points.items():
        if name not in sums:
            found[name] = "it does not fire in a forward pass; this architecture computes it elsewhere."
            continue
        out = outs[name].double()
        if point.experts is not None and point.experts.chosen is None:
            out = out.unflatten(0, (point.experts.n_experts, -1)).sum(0)
        error = (sums[name].reshape(out.shape) - out).abs().max().item()
        if not error <= 256 * torch.finfo(outs[name].dtype).eps * max(1.0, out.abs().max().item()):
            found[name] = f"its sum over the experts is not what they give out (off by {error:.2e})."
        elif name.replace("hook_expert_out", "hook_router_weights") not in live:
            found[name] = "no gradient of the logits reaches what the experts give out."
    return found
