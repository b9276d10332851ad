"""Proofs that attention computed with its scores and its pattern is the attention of the model that was opened.

They are the only points at which something is computed otherwise than the model does it, so their rounding differs too,
and a model that chooses experts or keys may answer a last digit with another choice, whatever the reason. So they are
proved where attention is called: on what the model's own attention is given it must give out what that gives, and the
model goes on with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.anatomy.precise import Precision
from hooks.anatomy.watching import attention_called_by, copied, forward
from hooks.engine import Hook, HookContext
from hooks.opened import Opened
from hooks.points import HookPoint
from hooks.selfcheck_writes import why_not

SQUARES = frozenset({"hook_attn_scores", "hook_pattern"})


class Out(NamedTuple):
    """What a call of attention gives out [batch pos head d_head], the sizes of what it sums, summed, and how many."""

    out: Float[Tensor, "..."]
    size: Float[Tensor, "..."]
    n_keys: int


Outs = Mapping[str, Sequence[Out]]
"""What the calls of attention give out, by the module that calls."""


class Bare(NamedTuple):
    """The model's own logits, and what its own attention gives out."""

    logits: Float[Tensor, "batch pos vocab"]
    outs: Outs


@torch.no_grad()
def bare_run(vlm: Opened, inputs: Mapping[str, Any]) -> Bare:
    """Run the model with nothing attached. What attention sums is seen by its own function, on the sizes of values."""
    names = {id(module): name for name, module in vlm.model.named_modules()}
    outs: dict[str, list[Out]] = {}

    def called(function: Callable, module: Any, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        result = function(module, query, key, value, *args, **kwargs)
        summed = function(module, query, key, value.abs(), *args, **kwargs)
        out, size = (one[0] if isinstance(one, tuple) else one for one in (result, summed))
        outs.setdefault(names.get(id(module), ""), []).append(Out(copied(out), size, key.shape[-2]))
        return result

    with attention_called_by(called):
        return Bare(forward(vlm.model, inputs), outs)


def by_module(points: Iterable[HookPoint]) -> dict[str, list[HookPoint]]:
    """Scores and patterns among points, by the module that attends."""
    squares: dict[str, list[HookPoint]] = {}
    for point in points:
        if point.leaf in SQUARES:
            squares.setdefault(point.module, []).append(point)
    return squares


@torch.no_grad()
def unlike_attention(
    vlm: Opened, inputs: Mapping[str, Any], own: Outs, precision: Precision
) -> dict[str, str]:
    """Scores and patterns that are not those of the model's own attention, with the reason.

    Args:
        vlm: the opened model.
        inputs: what it is run on.
        own: what its own attention gives out on them.
        precision: that it is run in.
    """
    squares = by_module(vlm.hook_points.values())
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
        if error := unlike(
            own.get(path, []), run.made.get(path, []), precision.eps, run.largest.get(path, 0.0)
        ):
            why = f"attention computed with it gives out other numbers than the model's own ({error})."
            absent |= {point.name: why for point in points}
    return absent


def largest_of(scores: Float[Tensor, "..."]) -> float:
    """The largest score of a key that may be looked at."""
    shown = scores.masked_fill(scores <= torch.finfo(scores.dtype).min, 0.0)
    return shown.abs().max().item() if shown.numel() else 0.0


def instead(own: Sequence[Out], call: int, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What the model's own attention gave out, in the place of what was computed with its scores.

    Args:
        own: what the calls of the model's own gave out.
        call: which call it is.
        z: what was computed.
    """
    outs = [one.out for one in own]
    if outs[0].shape[1:] != z.shape[-3:] and call == 0:  # windows one by one
        outs = [torch.cat(outs, dim=1)]
    return outs[call].reshape(z.shape)


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
            hooks.append(Hook(self._go_on, HookContext(z)))
        with vlm.attached(hooks):
            forward(vlm.model, inputs)

    def _square(self, square: Tensor, hook: HookContext) -> Tensor:
        if hook.point.leaf == "hook_attn_scores":
            path = hook.point.module
            self.largest[path] = max(self.largest.get(path, 0.0), largest_of(square))
        return square.clone()

    def _go_on(self, z: Tensor, hook: HookContext) -> Tensor:
        path = hook.point.module
        made = self.made.setdefault(path, [])
        made.append(z.clone())
        return instead(self._own[path], len(made) - 1, z)


def unlike(own: Sequence[Out], other: Sequence[Tensor], eps: float, largest: float) -> str:
    """How far what heads give out lies apart, if that is more than rounding: a share of what a head summed there.

    A mean of a thousand values that cancel is far smaller than they are, and rounded as they are; a sum of n of them in
    float32 whatever the model's precision, by some root of n steps.

    Args:
        own: what the model's own attention gives out.
        other: what is held against it.
        eps: the rounding step of what both were computed in.
        largest: the largest score, which softmax turns from a sum's rounding into a factor's.
    """
    if not other:
        return ""
    a, size = (
        torch.cat([part.flatten(0, -3) for part in parts]).double()
        for parts in ([one.out for one in own], [one.size for one in own])
    )
    b = torch.cat([one.flatten(0, -3) for one in other]).double()
    if a.shape != b.shape:
        return f"{list(b.shape)} instead of {list(a.shape)}"
    root = max(one.n_keys for one in own) ** 0.5
    allowed = (4 * eps + root * torch.finfo(torch.float32).eps) * (1 + largest)
    nothing = (b.flatten(1) == 0).all(-1)  # a token that may look at nothing
    error = (a - b).abs() / size.amax(-1, keepdim=True).clamp(min=1e-30)
    off = error[~nothing].max().item() if not bool(nothing.all()) else 0.0
    return "" if off <= allowed else f"off by {off:.2e} of their size, where rounding allows {allowed:.2e}"
