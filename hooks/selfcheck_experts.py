"""Proofs, on the model that was opened, that points of experts are what they say they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.anatomy.precise import in_float32, runs_in_float32, within_rounding
from hooks.anatomy.watching import forward
from hooks.errors import one_line
from hooks.opened import Opened
from hooks.points import HookPoint
from hooks.selfcheck_writes import apart


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
    found: dict[str, str] = {}
    try:
        logits, sums = _written_back(vlm, inputs, points)
        moved = apart(logits, bare)
        with in_float32(vlm.model, runs_in_float32(vlm.anatomy)) as precision:
            if precision.acts:
                _, sums = _written_back(vlm, precision.given(inputs), points)
    except torch.OutOfMemoryError:  # says nothing about a point
        raise
    except Exception as error:
        why = one_line(error)
        return dict.fromkeys(points, why)
    if not moved <= allowed:
        return dict.fromkeys(points, f"writing its own value back moved the logits by {moved:.2e}.")
    for name in points:
        if name not in sums:
            found[name] = "it does not fire in a forward pass; this architecture computes it elsewhere."
        elif not within_rounding(sums[name].error, sums[name].size, precision.eps):
            off = sums[name].error.abs().max().item()
            found[name] = f"its sum over the experts is not what they give out (off by {off:.2e})."
        elif name.replace("hook_expert_out", "hook_router_weights") not in live:
            found[name] = "no gradient of the logits reaches what the experts give out."
    return found


class _Sum(NamedTuple):
    """What contributions sum to less what the experts give out, and how much was summed."""

    error: Float[Tensor, "*token d"]
    size: Float[Tensor, "*token d"]


def _written_back(
    vlm: Opened, inputs: Any, points: Mapping[str, HookPoint]
) -> tuple[Float[Tensor, "batch pos vocab"], dict[str, _Sum]]:
    """Logits, and for each point how what it shows compares with what the experts give out."""
    outs: dict[str, Tensor] = {}
    sums: dict[str, _Sum] = {}

    def write_back(activation: Tensor, hook: Any) -> Tensor:
        out, each = outs[hook.name].double(), activation.double()
        if points[hook.name].experts.chosen is None:  # type: ignore[union-attr]
            out = out.unflatten(0, (each.shape[-2], -1)).sum(0)
        total = each.sum(-2)
        sums[hook.name] = _Sum(
            total - out.reshape(total.shape), each.abs().sum(-2) + out.abs().reshape(total.shape)
        )
        return activation.clone()

    with ExitStack() as stack:
        stack.enter_context(vlm.hooks([(name, write_back) for name in points]))
        for name, point in points.items():

            def keep(module: Any, args: tuple, output: Tensor, name: str = name) -> None:
                outs[name] = output

            # Before the hook that shows the contributions, which is the first so far.
            handle = vlm.module(point.module).register_forward_hook(keep, prepend=True)
            stack.callback(handle.remove)
        return forward(vlm.model, inputs), sums
