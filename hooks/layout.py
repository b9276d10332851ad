"""Whether the tensor at a hook point is laid out as the point's axes say, looked at in one forward pass.

Some models put the tokens of a batch in a row inside a block, or carry an axis of one along: such a point is shown with
the axes of its block's own stream. What fits no such reading is absent, with its shape.

With one prompt a tensor whose first axis are the tokens looks the same as one with an axis of one before them. So the
model runs on two as well (where it runs on the prompt and a copy), the second of them with other words and pixels: each
reading must hold there too, and the first prompt's numbers stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from hooks.anatomy.beside import other_pixels, other_words
from hooks.anatomy.watching import forward
from hooks.engine import Hook, HookContext
from hooks.opened import Opened
from hooks.points import HookPoint

LEAD = ("batch", "pos", "stream", "image", "patch", "row", "column")
"""Axes of a stream before its width."""
_PROJECTED = {
    2: ("image_token", "d_model"),
    3: ("image", "image_token", "d_model"),
    4: ("image", "row", "column", "d_model"),
    5: ("image", "media", "tile", "image_token", "d_model"),
}


def laid_out(vlm: Opened, inputs: Mapping[str, Any]) -> tuple[dict[str, HookPoint], dict[str, str]]:
    """The points as the model's tensors are, and those that no reading fits: name → reason.

    Args:
        vlm: the opened model, with the points of its table.
        inputs: what it is opened with.
    """
    points, absent = readings(vlm, {name: calls[-1] for name, calls in _shapes(vlm, inputs).items()})
    # A tower may attend once for each image.
    shapes = {name: calls[0] for name, calls in _shapes(vlm, _two(inputs)).items() if len(calls) == 1}
    again, other = readings(vlm, shapes)
    for name in shapes:
        if name in points and again.get(name) != points[name]:
            absent[name] = other.get(name, f"with two prompts its tensor is {list(shapes[name])}.")
    if shapes:
        relaid = [p for name, p in points.items() if p.relaid and name not in absent and name in shapes]
        absent |= _scrambled(vlm, relaid, inputs)
    return {name: point for name, point in points.items() if name not in absent}, absent


def readings(
    vlm: Opened, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, HookPoint], dict[str, str]]:
    """The points as tensors of these shapes are, and those that no reading fits."""
    points: dict[str, HookPoint] = {}
    absent: dict[str, str] = {}
    for name, point in vlm.hook_points.items():
        found = point if name not in shapes else _as_it_is(vlm, point, shapes)
        if found is None:
            absent[name] = f"its tensor is {list(shapes[name])}, which is not [{' '.join(point.axes)}]."
        else:
            points[name] = found
    return points, absent


def _two(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt and a copy of it."""
    return {name: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for name, v in inputs.items()}


def _scrambled(vlm: Opened, points: Sequence[HookPoint], inputs: Mapping[str, Any]) -> dict[str, str]:
    """Points whose reading mixes two prompts: another second one changes what stands in the first one's place."""
    if not points:
        return {}
    two = _two(inputs)
    other = two | {name: torch.cat([inputs[name], new]) for name, new in other_pixels(inputs).items()}
    alike = _values(vlm, points, two)
    with other_words(vlm.model, vlm.anatomy.embed, slice(1, None)):
        changed = _values(vlm, points, other)
    found: dict[str, str] = {}
    for name, value in alike.items():
        axis = int(len(value) == 1)  # the patches of all images may be one long row
        first, kept = value.chunk(2, axis)[0], changed[name].chunk(2, axis)[0]
        if (first - kept).abs().max() > torch.finfo(first.dtype).eps ** 0.5 * first.abs().max():
            found[name] = "its tensor has the tokens of two prompts in one another's places."
    return found


def _values(vlm: Opened, points: Sequence[HookPoint], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def look(activation: Tensor, hook: HookContext) -> None:
        seen[hook.name] = activation.detach().clone()

    with torch.no_grad(), vlm.attached([Hook(look, HookContext(point)) for point in points]):
        forward(vlm.model, inputs)
    return seen


def _shapes(vlm: Opened, inputs: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """What each point's function is shown, call by call.

    The insides of attention are left out where they cannot be looked at.
    """
    whole = [
        point for point in vlm.hook_points.values() if point.place not in ("expert_out", "router_weights")
    ]
    for wanted in (whole, [point for point in whole if point.place != "attention"]):
        shapes: dict[str, list[tuple[int, ...]]] = {}

        def look(activation: Tensor, hook: HookContext, shapes: dict = shapes) -> None:
            shapes.setdefault(hook.name, []).append(tuple(activation.shape))

        hooks = [Hook(look, HookContext(point)) for point in wanted]
        try:
            with torch.no_grad(), vlm.attached(hooks):
                forward(vlm.model, inputs)
        except torch.OutOfMemoryError:  # says nothing about a point
            raise
        except Exception:  # the self-check says which point it is, and why
            continue
        return shapes
    return {}


def _as_it_is(vlm: Opened, point: HookPoint, shapes: Mapping[str, tuple[int, ...]]) -> HookPoint | None:
    shape = shapes[point.name]
    if point.leaf in ("hook_out", "hook_deepstack"):
        axes = _PROJECTED.get(len(shape))
        return None if axes is None else replace(point, axes=axes)
    first = f"{point.tower}blocks.{point.layer or 0}.hook_resid_pre"
    stream = shapes.get(first)
    if stream is None or point.experts is not None:
        return point
    own = tuple(axis for axis in point.axes if axis in LEAD)
    lead = _sizes(vlm.hook_points[first].axes, stream, own)
    if "key" in point.axes:
        return point if len(shape) == len(point.axes) else None
    if len(shape) == len(point.axes) and shape[: len(lead)] == lead:
        return point
    behind = len(point.axes) - len(own)
    if point.layer is None or len(lead) != len(own) or prod(shape[: len(shape) - behind]) != prod(lead):
        return None
    aside = None if "stream" in point.axes else vlm.anatomy.towers[point.tower].streams
    return replace(point, relaid=True, aside=aside, stream=vlm.hook_points[first].module)


def _sizes(axes: tuple[str, ...], shape: tuple[int, ...], own: tuple[str, ...]) -> tuple[int, ...]:
    """The sizes of a stream's axes, of those that a point has too."""
    known = dict(zip(axes, shape, strict=False))
    return tuple(known[axis] for axis in own if axis in known)
