"""An intervention bound to one batch: which activation, where, and what takes its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import HookedVLM
from hooks.engine import HookContext
from hooks.points import HookPoint
from interp.sweep.activations import INDEXED, kept_for

Stage = Literal["pre", "inside", "mid", "post", "final"]
"""Where in its block an edit acts: before it, inside its attention, on what its first writer adds, on what its MLP
adds, or (after all blocks) on the normalized stream."""
STAGES: tuple[Stage, ...] = ("pre", "inside", "mid", "post", "final")

_STAGE_OF: dict[str, Stage] = {
    "hook_embed": "pre",
    "hook_out": "pre",
    "hook_resid_pre": "pre",
    "hook_q": "inside",
    "hook_k": "inside",
    "hook_v": "inside",
    "hook_rot_q": "inside",
    "hook_rot_k": "inside",
    "hook_attn_scores": "inside",
    "hook_pattern": "inside",
    "hook_z": "mid",
    "hook_result": "mid",
    "hook_attn_out": "mid",
    "hook_mixer_out": "mid",
    "hook_cross_attn_out": "mid",
    "hook_resid_mid": "mid",
    "hook_post": "post",
    "hook_expert_out": "post",
    "hook_mlp_out": "post",
    "hook_resid_post": "post",
    "hook_normalized": "final",
}


@dataclass(frozen=True)
class Span:
    """The columns [start, stop) of a batch."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def columns(self) -> slice:
        """For indexing the position axis."""
        return slice(self.start, self.stop)


New = Callable[[Float[Tensor, "..."], Span], Float[Tensor, "..."]]
"""From the activation (of one head, neuron or expert, where one is meant) at a span's columns to its replacement."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One activation, at some tokens, replaced.

    Attributes:
        point: the hook point.
        new: what takes the activation's place; see `New`.
        where: the tokens (for scores and pattern: the queries); None for points without a token axis, whole.
        index: head (of `kv_head`s for k and v), neuron or expert; None for the whole activation.
    """

    point: HookPoint
    new: New
    where: Bool[Tensor, "batch pos"] | None
    index: int | None = None

    @cached_property
    def stage(self) -> Stage | None:
        """None for what lies in another tower, and for points inside a block that no shortcut starts at."""
        experts = self.point.experts
        elsewhere = self.point.tower or self.point.across
        if elsewhere or (experts is not None and not experts.added):
            return None
        return _STAGE_OF.get(self.point.leaf)

    @cached_property
    def start(self) -> tuple[int, int]:
        """Layer and stage that an edit begins to act at, as numbers that sort; (-1, 0) before the decoder."""
        if self.stage is None:
            return (-1, 0)
        layer = self.point.layer
        layer = (10**6 if self.stage == "final" else 0) if layer is None else layer
        return (layer, STAGES.index(self.stage))

    def first_column(self) -> int | None:
        """The first column that changes; None if no token is touched."""
        if self.where is None:
            return 0
        columns = self.where.any(0).nonzero()
        return int(columns[0]) if len(columns) else None

    def apply(self, activation: Float[Tensor, "..."], span: Span) -> Float[Tensor, "..."]:
        """The activation [row, its columns of the span, ...] with this edit in it; the input is left as it is."""
        axis = self._index_axis
        if axis is None:
            return self.alone(activation, span)
        whole = activation.clone()
        whole.select(axis, self._index).copy_(self.alone(activation.select(axis, self._index), span))
        return whole

    def alone(self, own: Float[Tensor, "..."], span: Span) -> Float[Tensor, "..."]:
        """`apply` to the head, neuron or expert that is meant, without the others."""
        new = self.new(own, span).to(own)
        if self.where is None and len(new) != len(own):  # rows of one of the images, each of which is a call
            new = new[span.columns]
        if self.point.leaf == "hook_attn_scores":  # what the mask hides stays hidden
            new = new.masked_fill(own == -torch.inf, -torch.inf)
        if self.where is not None:
            here = self.where[:, span.columns].to(own.device)
            here = (
                here[:, None]
                if self.point.axes[-2:] == ("query", "key") and self._index_axis is None
                else here
            )
            new = torch.where(here.reshape(*here.shape, *[1] * (own.ndim - here.ndim)), new, own)
        return new

    def hook(self) -> tuple[str, Callable[[Tensor, HookContext], Tensor]]:
        """The same as a forward hook of a whole forward pass."""
        width = None if self.where is None else self.where.shape[1]
        alone = self.index is not None and self.point.place == "expert_out"  # no other expert is computed
        apply = self.alone if alone else self.apply

        def write(activation: Tensor, hook: HookContext) -> Tensor:
            if width is not None:
                return apply(activation, Span(0, width))
            first = hook.ctx.get("rows", 0)  # of the calls before this one: an edit is one forward pass long
            hook.ctx["rows"] = first + len(activation)
            return apply(activation, Span(first, first + len(activation)))

        return f"{self.point.name}.{self.index}" if alone else self.point.name, write

    @property
    def _index(self) -> int:
        assert self.index is not None
        return self.index

    @property
    def _index_axis(self) -> int | None:
        if self.index is None:
            return None
        axes = self.point.axes
        for name in INDEXED:
            if name in axes:
                return axes.index(name)
        raise AssertionError(f"{self.point.name} has neither heads nor neurons nor experts")


def needed_names(edits: list[Edit], vlm: HookedVLM) -> list[str]:
    """Activations of the clean run that these edits are built from."""
    names: dict[str, None] = {}
    for edit in edits:
        if edit.point.leaf in ("hook_embed", "hook_out"):
            names[edit.point.name] = None
        if edit.stage not in ("mid", "post"):
            continue
        block, leaf = f"blocks.{edit.point.layer}", edit.point.leaf
        if leaf in ("hook_z", "hook_result"):
            names |= {f"{block}.attn.hook_z": None, f"{block}.hook_attn_out": None}
        elif leaf == "hook_post":
            names |= {f"{block}.mlp.hook_post": None, f"{block}.hook_mlp_out": None}
        elif leaf == "hook_expert_out":
            names |= dict.fromkeys([*kept_for(vlm, [edit.point.name]), f"{block}.hook_mlp_out"])
        elif leaf.endswith("_out"):
            names[f"{block}.{leaf}"] = None
    return [name for name in names if name in vlm.hook_points]
