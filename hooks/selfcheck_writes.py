"""Proofs that what is written at a point is what the model goes on with: its own value, written back, moves nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.anatomy.precise import eps_of
from hooks.anatomy.watching import forward
from hooks.errors import FrankenlensError, one_line
from hooks.opened import Opened

Seen = Mapping[str, Sequence[Tensor]]
"""What stood at each point, call by call."""
KEPT = re.compile(r"hook_(embed|resid_\w+|\w+_out(_\d+)?|post|z)$")
"""Points whose numbers are looked at; those of each head or expert would take many times the memory."""


def tolerance(logits: Float[Tensor, "..."]) -> float:
    """1e-5 x max(1, largest logit) in fp32; in a half precision, sixteen of its own rounding steps.

    Words that a model never says (their logits are the lowest number) are left out.
    """
    said = logits[logits.isfinite() & (logits > torch.finfo(logits.dtype).min)]
    scale = max(1.0, said.abs().max().item()) if said.numel() else 1.0
    wide = logits.dtype in (torch.float32, torch.float64)
    return scale * (1e-5 if wide else 16 * torch.finfo(logits.dtype).eps)


def tolerance_of_a_write(bare: Float[Tensor, "..."]) -> float:
    """How far logits may move when own values are written back: a copy may be summed in another order."""
    return tolerance(bare) if eps_of(bare) < 1e-6 else tolerance(bare) / 8


def apart(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> float:
    """The largest difference of two tensors; numbers that are not finite must be the same."""
    return torch.where(a == b, 0.0, (a.double() - b.double()).abs()).max().item()


class Writes:
    """Every point's own value written back, all together or some alone.

    Args:
        vlm: the opened model.
        inputs: what it is run on.
        bare: its own logits.
    """

    def __init__(
        self, vlm: Opened, inputs: Mapping[str, Any], bare: Float[Tensor, "batch pos vocab"]
    ) -> None:
        self.vlm, self.inputs, self.bare = vlm, inputs, bare
        self.allowed = tolerance_of_a_write(bare)

    @torch.no_grad()
    def back(self, names: Sequence[str], seen: dict[str, list[Tensor]]) -> float:
        """Write all of these back: by how much the logits move. What stands at some of them goes into `seen`."""
        seen.clear()

        def write_back(activation: Tensor, hook: Any) -> Tensor:
            if KEPT.search(hook.name):
                seen.setdefault(hook.name, []).append(activation.clone())
            return activation.clone()

        with self.vlm.hooks([(name, write_back) for name in names]):
            return apart(forward(self.vlm.model, self.inputs), self.bare)

    def sound(self, names: Sequence[str]) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
        """What stands at the points that can be written back, and the others with the reason.

        Kinds that cannot are found by halving; of each, single points.

        Raises:
            FrankenlensError: each can, but the model does not run when all are.
        """
        seen: dict[str, list[Tensor]] = {}
        if not self._fails(names, seen):
            return seen, {}
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(re.sub(r"\d+", "", name), []).append(name)
        absent: dict[str, str] = {}
        for alike in self._failing_kinds(list(kinds.values())):
            absent |= self._failing_points(alike)
        left = [name for name in names if name not in absent]
        if why := why_not(lambda: self.back(left, seen)):
            raise FrankenlensError(f"self-check of {type(self.vlm.model).__name__}: {why}")
        return seen, absent

    def _failing_kinds(self, kinds: list[list[str]]) -> list[list[str]]:
        """Of kinds that fail together, those that fail by themselves: they are few."""
        if len(kinds) == 1:
            return kinds
        middle = len(kinds) // 2
        failing = [
            half for half in (kinds[:middle], kinds[middle:]) if self._fails([n for k in half for n in k])
        ]
        return [kind for half in failing for kind in self._failing_kinds(half)]

    def _failing_points(self, alike: list[str]) -> dict[str, str]:
        """Of points of one kind that fail together, those that fail alone: one, or most of them."""
        middle = len(alike) // 2
        failing = [half for half in (alike[:middle], alike[middle:]) if half and self._fails(half)]
        if len(failing) == 1 and 1 < len(failing[0]) < len(alike):
            return self._failing_points(failing[0])
        return {name: reason for half in failing for name in half if (reason := self._fails([name]))}

    def _fails(self, names: Sequence[str], seen: dict[str, list[Tensor]] | None = None) -> str:
        moved = 0.0

        def attempt() -> None:
            nonlocal moved
            moved = self.back(names, {} if seen is None else seen)

        if why := why_not(attempt):
            return why
        if moved <= self.allowed:
            return ""
        return f"writing its own value back moved the logits by {moved:.2e} (allowed {self.allowed:.2e})."

    def with_gradients(self, names: Sequence[str], seen: Seen) -> tuple[frozenset[str], set[str]]:
        """The points that the logits have a gradient at, and those that fired.

        Args:
            names: the points.
            seen: what stands there otherwise: attention computed with its scores goes on with its own z, to the bit.
        """
        taps: dict[str, Tensor] = {}

        def write_back(activation: Tensor, hook: Any) -> Tensor:
            own = activation.clone()
            if hook.name.endswith("hook_z"):
                own = seen[hook.name][hook.calls - 1] + (own - own.detach())
            taps[hook.name] = own if own.requires_grad else own.requires_grad_()
            return own.clone()  # the model may edit it in place

        with torch.enable_grad(), self.vlm.hooks([(name, write_back) for name in names]):
            return live_taps(forward(self.vlm.model, self.inputs), taps), set(taps)


def live_taps(logits: Float[Tensor, "batch pos vocab"], taps: Mapping[str, Tensor]) -> frozenset[str]:
    """Of tensors, those that the logits have a gradient at, along a random direction."""
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    along = direction.to(logits.device, logits.dtype)
    gradients = torch.autograd.grad(logits, list(taps.values()), grad_outputs=along, allow_unused=True)
    return frozenset(name for name, g in zip(taps, gradients, strict=True) if g is not None and bool(g.any()))


def why_not(attempt: Callable[[], Any]) -> str:
    """What an attempt fails with, in one line; "" if it does not."""
    try:
        attempt()
    except torch.OutOfMemoryError:  # says nothing about a point
        raise
    except Exception as error:
        return one_line(error)
    return ""


@torch.no_grad()
def looked_at(vlm: Opened, inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Tensor]]:
    """What stands at points while the model runs, call by call."""
    seen: dict[str, list[Tensor]] = {}

    def look(activation: Tensor, hook: Any) -> None:
        seen.setdefault(hook.name, []).append(activation.clone())

    with vlm.hooks([(name, look) for name in names]):
        forward(vlm.model, inputs)
    return seen
