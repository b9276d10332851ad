"""The maps that are asked for most, each one call of `sweep`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from hooks import FrankenlensError, HookedVLM
from interp.metrics import Metric
from interp.prompts import Prompt
from interp.sweep.engine import sweep
from interp.sweep.intervention import Intervention
from interp.sweep.places import Where, where_label


def residual_map(
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    metric: Metric,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    kind: str = "replace",
    **settings: Any,
) -> xr.Dataset:
    """The residual stream before every layer, at every single token.

    Args:
        recipient: the opened model.
        prompts: what it reads; positions count from each prompt's first token.
        metric: what is measured.
        layers: by default all.
        positions: by default every token of the longest prompt.
        kind: as of `Intervention`; `replace` takes the activation of `donor=` or `donor_prompts=`.
        settings: passed on to `sweep`.

    Returns:
        Variables value [layer position example] (NaN beyond an example's end) and clean [example].
    """
    layers = range(recipient.n_layers) if layers is None else layers
    positions = range(max(len(prompt) for prompt in prompts)) if positions is None else positions

    def at(layer: int, position: int) -> Intervention:
        return Intervention(f"blocks.{layer}.hook_resid_pre", kind, position)

    axes = {"layer": list(layers), "position": list(positions)}
    return _map(recipient, prompts, metric, axes, at, settings)


def head_map(
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    metric: Metric,
    *,
    roles: Sequence[Where] = ("all",),
    layers: Sequence[int] | None = None,
    kind: str = "replace",
    **settings: Any,
) -> xr.Dataset:
    """Every head's result, at every role.

    Args:
        recipient: the opened model.
        prompts: what it reads.
        metric: what is measured.
        roles: places in the prompt; see `Where`.
        layers: by default all.
        kind: as of `Intervention`; `replace` takes the activation of `donor=` or `donor_prompts=`, through the donor's
            own W_O.
        settings: passed on to `sweep`.

    Returns:
        Variables value [layer head role example] (NaN where an example has no such token) and clean [example].
    """
    layers = range(recipient.n_layers) if layers is None else layers
    heads = list(range(recipient.n_heads))
    places = {where_label(role): role for role in roles}

    def at(layer: int, head: int, role: str) -> Intervention:
        return Intervention(f"blocks.{layer}.attn.hook_result", kind, places[role], head)

    axes = {"layer": list(layers), "head": heads, "role": list(places)}
    return _map(recipient, prompts, metric, axes, at, settings)


def _map(
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    metric: Metric,
    axes: dict[str, list],
    at: Callable[..., Intervention],
    settings: dict[str, Any],
) -> xr.Dataset:
    empty = [name for name, values in axes.items() if not values]
    if empty:
        raise FrankenlensError(f"a map needs at least one {empty[0]}")
    shape = [len(values) for values in axes.values()]
    sites = [
        at(*(values[i] for values, i in zip(axes.values(), index, strict=True)))
        for index in np.ndindex(*shape)
    ]
    found = sweep(recipient, prompts, sites, metric, **settings)
    units = {"units": metric.units}
    return xr.Dataset(
        {
            "value": ((*axes, "example"), found.value.values[0].reshape(*shape, len(prompts)), units),
            "clean": (("example",), found.clean.values[0], units),
        },
        coords={**axes, "example": found.example.values},
        attrs={"metric": metric.name, "units": metric.units},
    )
