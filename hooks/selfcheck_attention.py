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

from hooks.anatomy.watching import attention_called_by, copied, forward
from hooks.attention import IN_FLOAT32
from hooks.engine import Hook, HookContext, HookFunction
from hooks.opened import Opened
from hooks.points import HookPoint
from hooks.selfcheck_writes import why_not

SQUARES = frozenset({"hook_attn_scores", "hook_pattern"})


Outs = Mapping[str, Sequence[Float[Tensor, "..."]]]
"""What the calls of attention give out [batch pos head d_head], by the module that calls."""


class Bare(NamedTuple):
    """The model's own logits, and what its own attention gives out."""

    logits: Float[Tensor, "batch pos vocab"]
    outs: Outs


@torch.no_grad()
def bare_run(vlm: Opened, inputs: Mapping[str, Any]) -> Bare:
    """Run the model with nothing attached."""
    names = {id(module): name for name, module in vlm.model.named_modules()}
    outs: dict[str, list[Tensor]] = {}

    def called(function: Callable, module: Any, *args, **kwargs):
        result = function(module, *args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        outs.setdefault(names.get(id(module), ""), []).append(copied(out))
        return result

    with attention_called_by(called):
        return Bare(forward(vlm.model, inputs), outs)


class Likeness:
    """How far attention computed with its scores lies from the model's own, call by call, on the same in float32.

    Each number of a head's output is held to a share of what was summed there: a mean of a thousand values that cancel
    is far smaller than they are, and rounded as they are. A sum of n of them is rounded by some root of n steps, and
    softmax turns the rounding of a score into a factor.

    Args:
        squares: scores and patterns by the module that attends (`by_module`).
    """

    def __init__(self, squares: Mapping[str, Sequence[HookPoint]]) -> None:
        self._off: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._n_keys: dict[str, int] = {}
        self._eps = torch.finfo(torch.float32).eps
        self.hooks = [
            Hook(self._beside, HookContext(HookPoint(IN_FLOAT32, path, "attention", ()))) for path in squares
        ]

    def _beside(self, both: Tensor, hook: HookContext) -> None:
        path, (dense, own, size) = hook.point.module, both.detach().double()
        self._eps = max(self._eps, torch.finfo(both.dtype).eps)
        dense, own, size = (one.reshape(-1, *one.shape[-2:]) for one in (dense, own, size))
        nothing = (dense.flatten(1) == 0).all(-1)  # a token that may look at nothing
        error = (dense - own).abs() / size.amax(-1, keepdim=True).clamp(min=1e-30)
        off = error[~nothing].max().item() if not bool(nothing.all()) else 0.0
        known = self._off.get(path, 0.0)
        self._off[path] = off if not off <= known else known  # what is no number stays

    def note(self, scores: Float[Tensor, "..."], hook: HookContext) -> None:
        """Scores as they are in a call, for the rounding that they allow."""
        path = hook.point.module
        shown = scores.masked_fill(scores <= torch.finfo(scores.dtype).min, 0.0)
        largest = shown.abs().max().item() if shown.numel() else 0.0
        self._largest[path] = max(self._largest.get(path, 0.0), largest)
        self._n_keys[path] = max(self._n_keys.get(path, 1), scores.shape[-1])

    def unlike(self, path: str) -> str:
        """By how much too much the two lie apart; "" where that is rounding."""
        step = torch.finfo(torch.float32).eps * (1 + self._largest.get(path, 0.0))
        allowed = 4 * self._eps + (4 + self._n_keys.get(path, 1) ** 0.5) * step
        off = self._off.get(path, 0.0)
        if off <= allowed:
            return ""
        return f"off by {off:.2e} of their size, where rounding allows {allowed:.2e}"


def by_module(points: Iterable[HookPoint]) -> dict[str, list[HookPoint]]:
    """Scores and patterns among points, by the module that attends."""
    squares: dict[str, list[HookPoint]] = {}
    for point in points:
        if point.leaf in SQUARES:
            squares.setdefault(point.module, []).append(point)
    return squares


@torch.no_grad()
def unlike_attention(vlm: Opened, inputs: Mapping[str, Any], own: Outs) -> dict[str, str]:
    """Scores and patterns that are not those of the model's own attention, with the reason.

    Args:
        vlm: the opened model.
        inputs: what it is run on.
        own: what its own attention gives out on them.
    """
    squares = by_module(vlm.hook_points.values())
    absent: dict[str, str] = {}
    runs: list[Likeness] = []
    if why_not(lambda: runs.append(_with_scores(vlm, inputs, squares, own))):
        for path in list(squares):
            alone = {path: squares[path]}
            if why := why_not(lambda alone=alone: _with_scores(vlm, inputs, alone, own)):
                absent |= {point.name: why for point in squares.pop(path)}
        runs.append(_with_scores(vlm, inputs, squares, own))
    for path, points in squares.items():
        if error := runs[-1].unlike(path):
            why = f"attention computed with it gives out other numbers than the model's own ({error})."
            absent |= {point.name: why for point in points}
    return absent


def _with_scores(
    vlm: Opened, inputs: Mapping[str, Any], squares: Mapping[str, Sequence[HookPoint]], own: Outs
) -> Likeness:
    """One forward in which attention is computed with its scores, and the model goes on with what its own gives out."""
    likeness = Likeness(squares)

    def square(activation: Tensor, hook: HookContext) -> Tensor:
        if hook.point.leaf == "hook_attn_scores":
            likeness.note(activation, hook)
        return activation.clone()

    def go_on(z: Tensor, hook: HookContext) -> Tensor:
        return instead(own[hook.point.module], hook.calls - 1, z)

    hooks = [*likeness.hooks, *beside_z(squares, go_on)]
    hooks += [Hook(square, HookContext(point)) for points in squares.values() for point in points]
    with vlm.attached(hooks):
        forward(vlm.model, inputs)
    return likeness


def beside_z(squares: Iterable[str], function: HookFunction) -> list[Hook]:
    """The function on what attention gives out, before whatever is hooked there."""
    return [Hook(function, HookContext(HookPoint("hook_z", path, "attention", ()))) for path in squares]


def instead(own: Sequence[Tensor], call: int, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What the model's own attention gave out, in the place of what was computed with its scores.

    Args:
        own: what the calls of the model's own gave out.
        call: which call it is.
        z: what was computed.
    """
    if own[0].shape[1:] != z.shape[-3:] and call == 0:  # windows one by one
        own = [torch.cat(list(own), dim=1)]
    return own[call].reshape(z.shape)
