"""Every proof that one forward pass and its gradients can give together; where one fails, none is taken from here.

All points' own values are written back, so the logits must stay what they were; what stands at streams and writers must
add up; attention is computed with its scores beside what the model's own gave out, and the model goes on with that; and
the gradient says which points the logits depend on. Most models pass all of it, and what is said about them is then the
same as from a run for each question. Of one that does not, `hooks.selfcheck` asks one question at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hooks.anatomy.watching import forward
from hooks.engine import Hook, HookContext
from hooks.opened import Opened
from hooks.selfcheck_attention import Bare, Likeness, beside_z, by_module, instead
from hooks.selfcheck_sums import unequal
from hooks.selfcheck_writes import KEPT, apart, live_taps, tolerance_of_a_write


class Once(NamedTuple):
    """What one run has shown: what stands at streams and writers, the shape at each point, and where a gradient is."""

    seen: Mapping[str, Sequence[Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    live: frozenset[str]


def at_once(vlm: Opened, inputs: Mapping[str, Any], bare: Bare, names: Sequence[str]) -> Once | None:
    """What a run shows in which all of these points' own values are written back; None where a proof fails in it.

    Args:
        vlm: the opened model, in evaluation mode.
        inputs: what it is run on.
        bare: what it gives without hooks.
        names: the points.
    """
    try:
        run = _Run(vlm, inputs, bare, names)
        if not run.moved <= tolerance_of_a_write(bare.logits) or unequal(vlm, run.seen) or run.unlike():
            return None
        return Once(run.seen, run.shapes, run.live())
    except torch.OutOfMemoryError:  # says nothing about a point
        raise
    except Exception:  # asked one at a time, each question says what is wrong with which point
        return None


class _Run:
    """The run with its gradients, and what was seen in it."""

    def __init__(self, vlm: Opened, inputs: Mapping[str, Any], bare: Bare, names: Sequence[str]) -> None:
        self._own = bare.outs
        self.seen: dict[str, list[Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._taps: dict[str, Tensor] = {}
        points = [vlm.hook_points[name] for name in names]
        self._squares = by_module(points)
        self._likeness = Likeness(self._squares)
        hooks = [*self._likeness.hooks, *beside_z(self._squares, self._go_on)]
        hooks += [Hook(self._write_back, HookContext(point)) for point in points]
        with torch.enable_grad(), vlm.attached(hooks):
            self._logits = forward(vlm.model, inputs)
        self.moved = apart(self._logits.detach(), bare.logits)

    def _write_back(self, activation: Tensor, hook: HookContext) -> Tensor:
        name = hook.point.name
        own = activation.clone()
        self.shapes[name] = tuple(own.shape)
        if hook.point.leaf == "hook_attn_scores":
            self._likeness.note(own.detach(), hook)
        if KEPT.search(name):
            self.seen.setdefault(name, []).append(own.detach())
        self._taps[name] = own if own.requires_grad else own.requires_grad_()
        return own.clone()  # the model may edit it in place

    def _go_on(self, z: Tensor, hook: HookContext) -> Tensor:
        """With what the model's own attention gave, to the bit, and the gradient of what has scores."""
        return instead(self._own[hook.point.module], hook.calls - 1, z) + (z - z.detach())

    def unlike(self) -> bool:
        """Whether attention computed with its scores gives out other numbers than the model's own."""
        return any(self._likeness.unlike(path) for path in self._squares)

    def live(self) -> frozenset[str]:
        """The points that the logits have a gradient at."""
        return live_taps(self._logits, self._taps)
