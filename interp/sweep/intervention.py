"""Interventions as a user states them, and how they are bound to one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from hooks.errors import nearest, shown
from hooks.points import HookPoint
from hooks.weights import d_mlp, site_at
from interp.prompts import PromptBatch
from interp.prompts.roles import ROLES
from interp.sweep.activations import INDEXED, of_index
from interp.sweep.edits import Edit, New, Span
from interp.sweep.places import LEADING, Where, cut_patches, where_label, where_mask

KINDS = ("replace", "add", "scale", "zero", "mean", "resample", "skip", "knockout")
PLACES = (*ROLES, "decision", "all")
"""Words for tokens."""
LARGEST = 1e38
"""Of a number that takes an activation's place: float32 holds no more."""
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
Means = Mapping[tuple[str, Where], Float[Tensor, "..."]]
"""Hook and place to the mean activation."""
Activations = Callable[[str, int | None], Float[Tensor, "..."]]
"""Hook point and head, neuron or expert to its activation in a clean run."""


@dataclass(frozen=True)
class Others:
    """A model's clean activations on every row's partner (`interp.prompts.pairing.partners`).

    Attributes:
        activation: by hook point and index.
        there: the rows that have a partner.
    """

    activation: Activations
    there: Bool[Tensor, " batch"]


def _partnered(other: Others | None, batch: PromptBatch) -> Bool[Tensor, " batch"]:
    if other is None:
        return torch.zeros(len(batch), dtype=torch.bool, device=batch.roles.device)
    return other.there


@dataclass(frozen=True, eq=False)
class Intervention:
    """One thing done to one activation.

    Attributes:
        hook: hook point, e.g. `blocks.3.attn.hook_result`.
        kind: one of `KINDS`. `replace` by `value` or, without one, by the donor's activation at the same place; `add`
            `value`; `scale` by `value`; `zero`; `mean`: the activation's mean over the tokens `where` of all prompts;
            `resample`: that of another prompt with the same roles (`interp.prompts.pairing.partners`), whatever the
            batch; `skip`: `hook_attn_out`, `hook_mlp_out` or, with `hook_resid_post`, the whole block adds nothing;
            `knockout`: on `attn.hook_attn_scores`, the edges from the keys `source` to the queries `where` are cut
            before the softmax.
        where: tokens that are acted on; points of the vision side have none and are taken whole, but for `knockout`.
        index: head, neuron of `mlp.hook_post`, or expert of `mlp.hook_expert_out`; None for the whole activation.
        value: broadcastable to the activation (of the head, neuron or expert).
        source: for `knockout`, the keys.
        label: name in the result; by default made of the rest.

    Example:
        >>> fl.Intervention("blocks.5.attn.hook_result", "replace", "decision", index=1).name
        'replace blocks.5.attn.hook_result.1 @ decision'
        >>> fl.Intervention("blocks.5.attn.hook_attn_scores", "knockout", "reasoning", source="image").name
        'knockout blocks.5.attn.hook_attn_scores @ image -> reasoning'
    """

    hook: str
    kind: str
    where: Where = "all"
    index: int | None = None
    value: Tensor | float | None = None
    source: Where | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        """The label."""
        if self.label is not None:
            return self.label
        index = "" if self.index is None else f".{self.index}"
        edges = f"{where_label(self.source)} -> " if self.source is not None else ""
        return f"{self.kind} {self.hook}{index} @ {edges}{where_label(self.where)}"


def mean_key(intervention: Intervention) -> tuple[str, Where]:
    """What the mean of a `mean` intervention is known by."""
    expert = intervention.index is not None and intervention.hook.endswith("hook_expert_out")
    hook = f"{intervention.hook}.{intervention.index}" if expert else intervention.hook
    return hook, intervention.where


def validate(intervention: Intervention, vlm: HookedVLM, has_donor: bool) -> None:
    """Refuses what cannot act where it is asked to.

    Raises:
        FrankenlensError: see the message.
    """
    _require_types(intervention)
    (name,) = vlm.names(intervention.hook)

    def refuse(why: str) -> None:
        raise FrankenlensError(f"intervention {intervention.name!r}: {why}")

    if name not in vlm.hook_points:
        hook, _, index = name.rpartition(".")
        refuse(f"name one expert as Intervention({hook!r}, ..., index={index})")
    point, kind = vlm.hook_points[name], intervention.kind

    if kind not in KINDS:
        refuse(f"kind {shown(kind)} is none of {', '.join(KINDS)}. {nearest(kind, KINDS)}".strip())
    if kind == "replace" and intervention.value is None and not has_donor:
        refuse("replace needs a value, or a donor (donor= or donor_prompts=)")
    if kind in ("add", "scale") and intervention.value is None:
        refuse(f"{kind} needs a value")
    if kind in ("zero", "mean", "resample", "skip", "knockout") and intervention.value is not None:
        refuse(f"{kind} takes no value")
    if kind == "skip" and point.leaf not in ("hook_attn_out", "hook_mlp_out", "hook_resid_post"):
        refuse("skip acts on hook_attn_out, hook_mlp_out or hook_resid_post")
    if kind == "skip" and intervention.index is not None:
        refuse("skip takes no index; zero the head's hook_result instead")
    if (kind == "knockout") != (intervention.source is not None):
        refuse("knockout needs source=, and only knockout takes it")
    if kind == "knockout" and point.leaf != "hook_attn_scores":
        refuse("knockout acts on attn.hook_attn_scores; to lose the edge's mass instead, scale hook_pattern")
    if kind == "resample" and point.axes[-1] == "key" and not has_tokens(point):
        refuse("resample needs an activation of patches; give donor_prompts= and replace instead")
    _refuse_values_of_tokens(intervention, point, refuse)
    if kind == "mean" and point.axes[-1] == "key":
        refuse("mean needs an activation; scores and patterns of prompts of different lengths have none")
    source = intervention.source or "all"
    if point.across and source != "all" and (not isinstance(source, int) or source < 0):
        refuse(f'{where_label(source)!r} is no key of another tower; give source="all", or a number from 0')
    for place in (intervention.where, source):
        if has_tokens(point) or place in ("all", "image"):
            continue
        if kind != "knockout":
            refuse(f'{name} has no text tokens ({" ".join(point.axes)}); leave where="all"')
        if isinstance(place, str) or (isinstance(place, int) and place < 0):
            refuse(f'{place!r} is no patch of the vision tower; give "all", a number from 0, or a function')
    size = index_size(point, vlm)
    if intervention.index is not None and not 0 <= intervention.index < size:
        refuse(
            f"index {intervention.index} is out of range; {name} has {size or 'no'} heads, neurons or experts to "
            "choose from"
        )


def _require_types(one: Intervention) -> None:
    """Refuse what is of another type than an intervention's parts are.

    Raises:
        FrankenlensError: names the part, and what it may be.
    """
    if not isinstance(one, Intervention):
        raise FrankenlensError(
            f"{shown(one)} is no intervention; give Intervention(hook, kind, ...), or a list of them"
        )

    def is_place(value: Any) -> bool:
        if isinstance(value, str):
            return value in PLACES
        return callable(value) or (_is_whole(value) and abs(value) < 2**31)

    places = f"{', '.join(PLACES)}, the number of a token, or a function of the batch"
    for name, sound, wanted in (
        ("hook", isinstance(one.hook, str), "the name of a hook point"),
        ("kind", isinstance(one.kind, str), f"one of {', '.join(KINDS)}"),
        ("where", is_place(one.where), places),
        ("index", one.index is None or _is_whole(one.index), "the number of a head, neuron or expert"),
        ("value", one.value is None or _is_value(one.value), "a number, or a tensor of numbers"),
        ("source", one.source is None or is_place(one.source), places),
        ("label", one.label is None or isinstance(one.label, str), "a text"),
    ):
        if not sound:
            given = getattr(one, name)
            hint = nearest(given, PLACES) if name in ("where", "source") else ""
            raise FrankenlensError(
                f"an intervention has {name}={shown(given)}; give {wanted}. {hint}".strip()
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_value(value: Any) -> bool:
    if isinstance(value, Tensor):
        return (value.is_floating_point() or value.dtype in _WHOLE) and not bool(value.isnan().any())
    if _is_whole(value):
        return abs(value) < LARGEST
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) == float(value)


def _refuse_values_of_tokens(
    intervention: Intervention, point: HookPoint, refuse: Callable[[str], None]
) -> None:
    """A segment of tokens is computed, not all of them: a value must be the same for every token and row."""
    if not isinstance(intervention.value, Tensor) or not has_tokens(point):
        return
    split = () if intervention.index is None else INDEXED
    axes = [axis for axis in point.axes if axis not in split]
    shape = (1,) * (len(axes) - intervention.value.ndim) + tuple(intervention.value.shape)
    if len(shape) != len(axes):
        refuse(f"value has {intervention.value.ndim} axes, the activation {len(axes)} ({' '.join(axes)})")
    for axis, size in zip(axes, shape, strict=True):
        if axis in ("batch", "pos", "query", "key") and size != 1:
            refuse(
                f"value has size {size} along {axis}; give one value for all of them, and one intervention for each "
                "place that gets another"
            )


def index_size(point: HookPoint, vlm: HookedVLM) -> int:
    """How many heads, neurons or experts a point has; 0 where it is not split."""
    if point.experts is not None:
        return point.experts.n_experts if "expert" in point.axes else 0
    if point.layer is None:
        return 0
    block = vlm.anatomy.towers[point.tower].blocks[point.layer]
    if "head" in point.axes or "kv_head" in point.axes:
        site = site_at(block, "cross_attn" if point.across else "attn")
        return site.n_kv_heads if "kv_head" in point.axes else site.n_heads
    return d_mlp(vlm.model, block) if "d_mlp" in point.axes else 0


def has_tokens(point: HookPoint) -> bool:
    """Whether the point has a batch and a token axis of the decoder."""
    return point.axes[0] == "batch" and not (point.across and not {"pos", "query"} & set(point.axes))


@dataclass(frozen=True, eq=False)
class Bound:
    """An intervention on one batch: its edits, and the rows that it touches."""

    edits: tuple[Edit, ...]
    rows: Bool[Tensor, " batch"]


def bind(
    intervention: Intervention,
    vlm: HookedVLM,
    batch: PromptBatch,
    donor: Activations | None,
    own: Activations,
    means: Means,
    other: Others | None = None,
) -> Bound:
    """The intervention on a batch.

    Args:
        intervention: valid (see `validate`).
        vlm: the recipient.
        batch: on its device.
        donor: the donor's activations on this batch; asked when an edit is applied.
        own: the recipient's, clean; likewise.
        means: of the `mean` interventions.
        other: what `resample` takes; None: nothing.
    """
    point = vlm.hook_points[intervention.hook]
    if not has_tokens(point):
        rows = batch.with_image if point.axes[0] != "batch" else batch.mask("all").any(1)
        if intervention.kind == "resample":
            rows = rows & _partnered(other, batch)
        if intervention.kind == "knockout":
            assert intervention.source is not None
            new = cut_patches(intervention.where, intervention.source, batch, intervention.index is not None)
        else:
            new = _new(intervention, point, donor, own, means, other)
        return Bound((Edit(point, new, None, intervention.index),), rows)
    where = where_mask(intervention.where, batch)
    if intervention.kind == "resample":
        where = where & _partnered(other, batch)[:, None]
    if intervention.kind == "knockout":
        assert intervention.source is not None
        if point.across:
            return Bound(
                (Edit(point, _cut_across(intervention.source), where, intervention.index),), where.any(1)
            )
        source = where_mask(intervention.source, batch)
        edges = (where[:, :, None] & source[:, None, :]).tril()
        return Bound((Edit(point, _cut(source), where, intervention.index),), edges.flatten(1).any(1))
    new = _new(intervention, point, donor, own, means, other)
    return Bound((Edit(point, new, where, intervention.index),), where.any(1))


def _cut(source: Bool[Tensor, "batch pos"]) -> New:
    def new(scores: Tensor, span: Span) -> Tensor:
        keys = source[:, : scores.shape[-1]].to(scores.device)
        keys = keys[:, None, :] if scores.ndim == 3 else keys[:, None, None, :]
        return scores.masked_fill(keys, -torch.inf)

    return new


def _cut_across(source: Where) -> New:
    """Keys of another tower: all, or one by its number."""
    return lambda scores, span: (
        torch.full_like(scores, -torch.inf)
        if source == "all"
        else scores.index_fill(-1, torch.tensor([source], device=scores.device), -torch.inf)
    )


def _new(
    intervention: Intervention,
    point: HookPoint,
    donor: Activations | None,
    own: Activations,
    means: Means,
    other: Others | None,
) -> New:
    kind, index, value = intervention.kind, intervention.index, intervention.value
    if kind == "add":
        return lambda activation, span: activation + _as(value, activation)
    if kind == "scale":
        return lambda activation, span: activation * _as(value, activation)
    if kind == "zero" or (kind == "skip" and point.leaf != "hook_resid_post"):
        return lambda activation, span: torch.zeros_like(activation)
    if kind == "mean":
        mean = means[mean_key(intervention)]
        if index is not None and point.place != "expert_out":
            lead = sum(axis in LEADING for axis in point.axes)
            mean = of_index(mean[(None,) * lead], point, index)[(0,) * lead]
        return lambda activation, span: mean.to(activation).expand_as(activation)
    if kind == "replace" and value is not None:
        return lambda activation, span: _as(value, activation).expand_as(activation)
    if kind == "skip":
        pre = point.name.replace("resid_post", "resid_pre")
        return lambda activation, span: _segment(own(pre, None), point, activation, span)
    if kind == "resample":
        assert other is not None  # no row is touched otherwise
        return lambda activation, span: _segment(other.activation(point.name, index), point, activation, span)
    assert donor is not None
    return lambda activation, span: _segment(donor(point.name, index), point, activation, span)


def _segment(source: Tensor, point: HookPoint, activation: Tensor, span: Span) -> Tensor:
    """The part of a whole batch's activation that stands for this segment of it."""
    if not has_tokens(point):
        return source.to(activation)
    if point.axes[-2:] == ("query", "key"):
        return source[..., span.columns, : activation.shape[-1]].to(activation)
    return source[:, span.columns].to(activation)


def _as(value: Tensor | float | None, activation: Tensor) -> Tensor:
    """A value in the shape of an activation.

    Raises:
        FrankenlensError: it does not fit.
    """
    own = torch.as_tensor(value, dtype=activation.dtype, device=activation.device)
    try:
        return own.expand_as(activation)
    except RuntimeError as error:
        raise FrankenlensError(
            f"value has the shape {tuple(own.shape)}, and the activation {tuple(activation.shape)}; give one that fits"
        ) from error
