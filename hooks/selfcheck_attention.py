"""Proofs that attention computed with its scores and its pattern is the attention of the model that was opened.

They are the only points at which something is computed otherwise than the model does it, so their rounding differs too,
and a model that chooses experts or keys may answer a last digit with another choice, whatever the reason. So they are
proved where attention is called: on what the model's own attention is given it must give out what that gives, and the
model goes on with its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.anatomy.precise import Precision
from hooks.anatomy.watching import Record, attention_watched, forward
from hooks.engine import Hook, HookContext
from hooks.opened import Opened
from hooks.points import HookPoint
from hooks.selfcheck_writes import why_not

SQUARES = frozenset({"hook_attn_scores", "hook_pattern"})
Outs = Mapping[str, Sequence[Float[Tensor, "..."]]]
"""What the calls of attention give out [batch pos head d_head], by the module that calls."""


@torch.no_grad()
def unlike_attention(vlm: Opened, inputs: Mapping[str, Any], precision: Precision) -> dict[str, str]:
    """Scores and patterns that are not those of the model's own attention, with the reason.

    Args:
        vlm: the opened model.
        inputs: what it is run on.
        precision: that it is run in.
    """
    squares: dict[str, list[HookPoint]] = {}
    for point in vlm.hook_points.values():
        if point.leaf in SQUARES:
            squares.setdefault(point.module, []).append(point)
    own = _given_out(vlm, inputs)
    absent: dict[str, str] = {}
    runs: list[_WithScores] = []
    if why_not(lambda: runs.append(_WithScores(vlm, inputs, squares, own))):
        for path in list(squares):
            alone = {path: squares[path]}
            if why := why_not(lambda alone=alone: _WithScores(vlm, inputs, alone, own)):
                absent |= {point.name: why for point in squares.pop(path)}
        runs.append(_WithScores(vlm, inputs, squares, own))
    run = runs[-1]
    for path, points in squares.items():
        allowed = 4 * precision.eps * (1 + run.largest.get(path, 0.0))
        if error := _unlike(own.get(path, []), run.made.get(path, []), allowed):
            why = f"attention computed with it gives out other numbers than the model's own ({error})."
            absent |= {point.name: why for point in points}
    return absent


def _given_out(vlm: Opened, inputs: Mapping[str, Any]) -> Outs:
    record, outs = Record(), {}
    names = {id(module): name for name, module in vlm.model.named_modules()}
    with attention_watched(record):
        forward(vlm.model, inputs)
    for one in record.attended:
        outs.setdefault(names.get(id(one.module), ""), []).append(one.out)
    return outs


class _WithScores:
    """One forward in which attention is computed with its scores, and the model goes on with what its own gives out.

    Attributes:
        made: what the calls give out that are computed so.
        largest: the largest score of each module's.
    """

    def __init__(
        self, vlm: Opened, inputs: Mapping[str, Any], squares: Mapping[str, Sequence[HookPoint]], own: Outs
    ) -> None:
        self._own = own
        self.made: dict[str, list[Tensor]] = {}
        self.largest: dict[str, float] = {}
        hooks = [Hook(self._square, HookContext(point)) for points in squares.values() for point in points]
        for path, (point, *_) in squares.items():
            z = HookPoint(f"{point.name.rpartition('.')[0]}.hook_z", path, "attention", ())
            hooks.append(Hook(self._instead, HookContext(z)))
        with vlm.attached(hooks):
            forward(vlm.model, inputs)

    def _square(self, square: Tensor, hook: HookContext) -> Tensor:
        if hook.point.leaf == "hook_attn_scores":
            shown = square[square > torch.finfo(square.dtype).min]
            size = shown.abs().max().item() if shown.numel() else 0.0
            self.largest[hook.point.module] = max(self.largest.get(hook.point.module, 0.0), size)
        return square.clone()

    def _instead(self, z: Tensor, hook: HookContext) -> Tensor:
        path = hook.point.module
        made, own = self.made.setdefault(path, []), self._own[path]
        made.append(z.clone())
        if own[0].shape[1:] != z.shape[-3:] and len(made) == 1:  # windows one by one
            own = [torch.cat(list(own), dim=1)]
        return own[len(made) - 1].reshape(z.shape)


def _unlike(own: Sequence[Tensor], other: Sequence[Tensor], allowed: float) -> str:
    """How far what heads give out lies apart, if that is more than a share of the largest number of its token."""
    if not other:
        return ""
    a = torch.cat([one.flatten(0, -3) for one in own]).double().flatten(1)
    b = torch.cat([one.flatten(0, -3) for one in other]).double().flatten(1)
    if a.shape != b.shape:
        return f"{list(b.shape)} instead of {list(a.shape)}"
    nothing = (b == 0).all(-1, keepdim=True)  # a token that may look at nothing
    error = (a - b).abs() / a.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    off = error.masked_fill(nothing, 0.0).max().item()
    return "" if off <= allowed else f"off by {off:.2e} of their size, where rounding allows {allowed:.2e}"
