"""Sweep and map against one full forward pass for each intervention."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.points import HookPoint
from interp.map import patch
from interp.map.components import POINTS, Component, components
from interp.sweep import Intervention, sweep
from tests.architectures.table.bench import Bench, Change, masked, worst
from tests.architectures.table.cells import FAILS, YES, Cell, finite

SKIPPED = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")
MEANT = ("hook_attn_out", "hook_mlp_out", "hook_mixer_out", "hook_cross_attn_out", "hook_resid_post")
LARGE = 100
"""How many times what is allowed to differ most effects must be."""
EARLY = ("vision.", "tower_", "projector.")
SHOWN = 16
"""Components of a map that are measured again, by full forwards."""


def sweep_cell(bench: Bench) -> Cell:
    """Every kind of intervention at every kind of point of a block of each kind."""
    wanted = list(_interventions(bench))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sweep(
            bench.vlm, bench.prompts, wanted, bench.metric, donor=bench.donor, batch_size=2, progress=False
        )
    values, clean = found["value"].to_numpy()[0], bench.measured(bench.clean)
    off: dict[str, float] = {"clean": bench.off(found["clean"].to_numpy()[0], clean)}
    effects = []
    for one, value in zip(wanted, values, strict=True):
        there = ~np.isnan(value)
        hooks = [reference(bench, one)]
        theirs = bench.measured(bench.full(hooks))
        off[one.name] = bench.off(value[there], theirs[there], hooks) if there.any() else np.nan
        effects.append(np.abs(theirs - clean).max())
    return verdict(off, effects, bench, caught)


def verdict(off: dict[str, float], effects: list[float], bench: Bench, caught: list) -> Cell:
    """A cell from differences in units of what is allowed, and effects."""
    name, number = worst(off)
    if not number <= 1.0:
        wrong = sum(not n <= 1.0 for n in off.values())
        return Cell(FAILS, f"{name} is {number:.1e} times what is allowed off ({wrong} of {len(off)})")
    allowed = 1e-5 * max(1.0, bench.clean[finite(bench.clean)].abs().max().item())
    if not np.median(effects) >= LARGE * allowed:
        return Cell(FAILS, f"effects are too small to tell: {np.median(effects):.1e}")
    return Cell(YES, longer_way(caught), number, len(off))


def longer_way(caught: list) -> str:
    """What a warning said of the way that was taken."""
    told = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    told = [one for one in told if "cannot be taken up" in one or "cannot be resumed" in one]
    if any("every rerun is a full forward" in one for one in told):
        return "by full forward passes"
    return "by reruns of all tokens from the layer on" if told else ""


def _interventions(bench: Bench) -> Iterator[Intervention]:
    points = bench.vlm.hook_points
    if not any(prompt.has_image for prompt in bench.prompts):  # Evolla's other tower reads proteins
        points = {name: point for name, point in points.items() if not name.startswith(EARLY)}
    layers = _one_of_each(bench)
    for name, point in points.items():
        vision = name.startswith(EARLY)
        if (point.layer in layers and not vision) or (vision and point.layer == 1):
            yield from _at(point)
        elif point.layer is None or point.leaf == "hook_deepstack":
            yield Intervention(name, "scale", "all", value=-0.5)


def _one_of_each(bench: Bench) -> list[int]:
    """The last block of every kind, but for the very last."""
    kinds: dict[tuple, int] = {}
    blocks = bench.vlm.anatomy.text.blocks
    for layer, block in enumerate(blocks[:-1] or blocks):
        kinds[tuple(w.role for w in block.writers), len(block.sites)] = layer
    return list(kinds.values())


def _has_tokens(point: HookPoint) -> bool:
    """Whether one axis numbers the tokens of the prompt; the keys of attention to another tower are that tower's."""
    keys = ".cross_attn." in point.name and "key" in point.axes and "query" not in point.axes
    return point.axes[0] == "batch" and not keys


def _at(point: HookPoint) -> Iterator[Intervention]:
    name, tokens = point.name, _has_tokens(point)
    where = "question" if tokens else "all"
    if point.leaf == "hook_attn_scores":
        yield Intervention(name, "knockout", "decision" if tokens else "all", source=2)
        return
    if point.leaf == "hook_pattern":
        yield Intervention(name, "scale", where, value=0.5)
        return
    yield Intervention(name, "zero", where)
    yield Intervention(name, "scale", "all", value=-0.5)
    yield Intervention(name, "replace", "decision" if tokens else "all")
    if any(axis in point.axes for axis in ("head", "kv_head")):
        yield Intervention(name, "zero", where, index=1)
    if tokens and point.leaf in MEANT:
        yield Intervention(name, "mean", where)
        yield Intervention(name, "resample", where)
        yield Intervention(name, "add", where, value=0.5)
    if tokens and point.leaf in SKIPPED:
        yield Intervention(name, "skip", "all")


def reference(bench: Bench, one: Intervention) -> tuple[str, Change]:
    """The same as a plain change in a full forward pass of both prompts."""
    point = bench.vlm.hook_points[one.hook]
    tokens = _has_tokens(point)
    new = _new(bench, one, point)
    if one.index is not None:
        axis = next(point.axes.index(a) for a in ("head", "kv_head") if a in point.axes)
        new = _of_one(new, axis, one.index)
    if not tokens:
        return one.hook, new
    axis = point.axes.index("query") if "query" in point.axes else 1
    return one.hook, masked(bench.where(one.where), new, axis)  # type: ignore[arg-type]


def _of_one(whole: Change, axis: int, index: int) -> Change:
    """The change of one head alone."""

    def new(value: Tensor, hook: object) -> Tensor:
        out = value.clone()
        out.select(axis, index).copy_(whole(value, hook).select(axis, index))
        return out

    return new


def _new(bench: Bench, one: Intervention, point: HookPoint) -> Change:
    def cached(vlm, name: str) -> Tensor:
        return vlm.run_with_cache(bench.inputs, name, use_cache=False)[1][name]

    if one.kind == "zero" or (one.kind == "skip" and point.leaf != "hook_resid_post"):
        return lambda value, hook: torch.zeros_like(value)
    number: Any = one.value
    if one.kind == "scale":
        return lambda value, hook: value * number
    if one.kind == "add":
        return lambda value, hook: value + number
    if one.kind == "knockout":
        key: Any = one.source
        _, alone = bench.vlm.run_with_cache(bench.tiny.inputs, one.hook, use_cache=False)
        length, tokens = alone[one.hook].shape[-1], point.axes[0] == "batch"
        return lambda value, hook: _cut(value, int(key), tokens, length)
    if one.kind == "skip":
        pre = cached(bench.vlm, one.hook.replace("resid_post", "resid_pre"))
        return lambda value, hook: pre
    if one.kind == "replace":
        theirs = cached(bench.donor, one.hook)
        return lambda value, hook: _part(theirs, value, hook)
    own = cached(bench.vlm, one.hook)
    if one.kind == "mean":
        mean = own[:, bench.where(one.where)].flatten(0, 1).mean(0)  # type: ignore[arg-type]
        return lambda value, hook: mean.expand_as(value)
    return lambda value, hook: _part(own.roll(1, 0), value, hook)


def _part(whole: Tensor, value: Tensor, hook: Any) -> Tensor:
    """The images that a module is called for now, where it is called once for each."""
    n = len(value)
    return whole if len(whole) == n else whole[(hook.calls - 1) * n : hook.calls * n]


def _cut(scores: Tensor, key: int, tokens: bool, alone: int) -> Tensor:
    """Without a key of each image (or token); `alone` is the length of a row that holds one image."""
    new = scores.clone()
    if tokens:
        new[..., key] = -torch.inf
        return new
    for first in range(0, scores.shape[-1], alone):
        new[..., first + key] = -torch.inf
    return new


def map_cell(bench: Bench) -> Cell:
    """Components of every kind, patched from the donor at every role."""
    vlm = bench.vlm
    wanted = components(vlm, POINTS)
    if not any(prompt.has_image for prompt in bench.prompts):
        wanted = [component for component in wanted if component.point not in ("vision", "projector")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = patch(
            vlm, bench.prompts, bench.prompts, bench.metric, POINTS, donor=bench.donor, progress=False
        )
    clean = bench.measured(bench.clean)
    off, effects = {}, []
    chosen = {component.point: component for component in wanted}
    few = [*chosen.values(), *wanted[:: max(1, len(wanted) // SHOWN)]]
    roles = [role for role in ("image", "question", "decision") if role in found["role"].to_numpy()]
    of_image = "image" if "image" in roles else "all"
    for component in dict.fromkeys(few):
        for role in roles if component.point not in ("vision", "projector") else [of_image]:
            ours = found["effect"].sel(component=component.name, role=role).to_numpy()[0]
            hooks = [_patched(bench, component, name, role) for name in component.hooks]
            theirs = bench.measured(bench.full(hooks)) - clean
            off[f"{component.name} @ {role}"] = bench.off(ours, theirs, hooks)
            effects.append(np.abs(theirs).max())
    itself = found["control_self"].to_numpy()
    off["the control: from itself"] = float(np.nanmax(np.abs(itself)) > 0) * 2
    return verdict(off, effects, bench, caught)


def _patched(bench: Bench, component: Component, name: str, role: str) -> tuple[str, Change]:
    point = bench.vlm.hook_points[name]
    theirs = bench.donor.run_with_cache(bench.inputs, name, use_cache=False)[1][name]

    def new(value: Tensor, hook: object) -> Tensor:
        if component.head is None:
            return _part(theirs, value, hook).to(value)
        out = value.clone()
        out[..., component.head, :] = theirs[..., component.head, :].to(value)
        return out

    early = component.point in ("vision", "projector")
    return name, new if early or point.axes[0] != "batch" else masked(bench.where(role), new, 1)
