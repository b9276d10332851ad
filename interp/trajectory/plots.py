"""A run over its steps as one figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from hooks.errors import FrankenlensError
from interp.results.palette import CONTROL, IN, MIXED, RL, SERIES
from interp.results.picture import Picture, nothing
from interp.trajectory.heads import head_survival, top_heads

LINES = 6
"""Components whose share is drawn."""
_CAPTION = (
    "One RL run over its steps. Upper left: share of the decision of step {reference} that a component carries when it "
    "is put from each checkpoint {into}; the {n} components that carry most at any step, with intervals over examples; "
    "hollow: not beyond random directions as large. Upper right: norm of the update of every block, and of what is in "
    "none, relative to that of IN's weights. Lower left: heads in the top {k} of a step, in the order in which they "
    "come in; hollow: not beyond random directions. Lower right: accuracy of greedy answers (red; IN's blue), and "
    "share of each step's top heads that are in step {reference}'s (purple; chance grey, dashed)."
)
_INTO = {"rl_to_in": "into IN", "in_to_rl": "of IN into it"}


def plot_trajectory(data: xr.Dataset, k: int | None = None, direction: str | None = None) -> Picture:
    """Components' shares, energy of the update, top heads, and accuracy, over the steps of a run.

    Args:
        data: what `over_steps` returns.
        k, direction: as of `interp.trajectory.heads.top_heads`.
    """
    if not data.sizes.get("step") or not data.sizes.get("component"):
        return nothing("No checkpoint of the run was measured, so there are no steps to draw.")
    direction = str(data["direction"].to_numpy()[0]) if direction is None else direction
    try:
        top = top_heads(data, k, direction)
    except FrankenlensError:
        top = None
    size = 0 if top is None else top.attrs["k"]
    told = {"reference": data.attrs["reference"], "into": _INTO[direction], "n": LINES, "k": size}
    figure = Picture(_CAPTION.format(**told), figsize=(11, 7.4))
    axes: Any = figure.subplots(2, 2)
    _shares(axes[0, 0], data.sel(direction=direction))
    _energy(figure, axes[0, 1], data)
    _heads(axes[1, 0], data.sel(direction=direction), top)
    _accuracy(axes[1, 1], data, None if top is None else head_survival(data, k, direction))
    for one in (axes[0, 0], axes[1, 1]):
        one.set_xlabel("RL step", fontsize=8)
        one.set_xticks(data["step"].to_numpy())
    for one in axes.flat:
        one.tick_params(labelsize=7)
    return figure


def _shares(axes: Axes, data: xr.Dataset) -> None:
    refused = bool(data.attrs["refused"])
    name = "effect_mean" if refused else "share"
    at = abs(data[name]).max("step").stack(cell=("component", "role"))  # each component where it carries most
    at = at.sel(cell=~at.isnull())
    order = at.isel(cell=np.argsort(-at.to_numpy(), kind="stable"))["cell"].to_numpy()
    chosen = list(dict(reversed(list(order))).items())[::-1][:LINES]
    steps = data["step"].to_numpy()
    axes.axhline(0, color=CONTROL, linewidth=0.8)
    for colour, (component, role) in zip(SERIES, chosen, strict=False):
        one = data.sel(component=component, role=role)
        values = one[name].transpose("step").to_numpy()
        low, high = (one[name + end].transpose("step").to_numpy() for end in ("_low", "_high"))
        label = component if role == "all" else f"{component} at {role}"
        axes.plot(steps, values, color=colour, linewidth=1.4, label=label)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        beyond = one["beyond"].transpose("step").to_numpy().astype(bool)
        axes.plot(steps[beyond], values[beyond], "o", color=colour, markersize=4)
        axes.plot(steps[~beyond], values[~beyond], "o", color=colour, markersize=4, mfc="white")
    units = data["effect"].attrs.get("units", "nats")
    axes.set_ylabel(f"effect, {units}" if refused else "share of the final decision", fontsize=8)
    axes.set_title("What carries the decision", fontsize=9)
    axes.legend(fontsize=7)


def _energy(figure: Picture, axes: Axes, data: xr.Dataset) -> None:
    every = [str(one) for one in data["address"].to_numpy()]
    blocks = [one for one in every if one.split(".")[-1].isdigit() and "head" not in one]
    rows = [*blocks, *(one for one in every if "blocks" not in one)]
    values = data["relative_norm"].sel(address=rows).transpose("address", "step").to_numpy()
    image = axes.imshow(values, aspect="auto", cmap="Greens", vmin=0, origin="lower")
    axes.set_xticks(range(data.sizes["step"]), [str(one) for one in data["step"].to_numpy()])
    every_nth = -(-len(rows) // 24)
    axes.set_yticks(range(0, len(rows), every_nth), rows[::every_nth])
    axes.set_xlabel("RL step", fontsize=8)
    axes.set_title("Energy of the update", fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.05)
    bar.set_label("norm of the update / norm of IN's weights", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _heads(axes: Axes, data: xr.Dataset, top: xr.DataArray | None) -> None:
    axes.set_title("Heads in the top set", fontsize=9)
    if top is None:
        axes.text(0.5, 0.5, "no heads were patched", ha="center", va="center", fontsize=8)
        axes.set_axis_off()
        return
    inside = top.to_numpy()
    ever = np.flatnonzero(inside.any(0))
    first = inside[:, ever].argmax(0)
    ever = ever[np.lexsort((-inside[:, ever].sum(0), first))]
    beyond = (
        data["beyond"].sel(component=top["component"]).any("role").transpose("step", "component").to_numpy()
    )
    for row, head in enumerate(ever):
        for at in np.flatnonzero(inside[:, head]):
            fill = MIXED if beyond[at, head] else "white"
            axes.plot(at, row, "s", color=MIXED, mfc=fill, markersize=7)
    axes.set_xticks(range(top.sizes["step"]), [str(one) for one in top["step"].to_numpy()])
    axes.set_yticks(range(len(ever)), [str(top["component"].to_numpy()[head]) for head in ever])
    axes.set_xlim(-0.5, top.sizes["step"] - 0.5)
    axes.set_ylim(-0.7, len(ever) - 0.3)
    axes.set_xlabel("RL step", fontsize=8)


def _accuracy(axes: Axes, data: xr.Dataset, survival: Any) -> None:
    steps = data["step"].to_numpy()
    axes.plot(steps, data["accuracy"].to_numpy(), "o-", color=RL, markersize=4, label="RL right")
    axes.axhline(data.attrs["in_accuracy"], color=IN, linewidth=1.2, label="IN right")
    if survival is not None:
        axes.plot(
            steps, survival["of_reference"], "s-", color=MIXED, markersize=4, label="top heads that stay"
        )
        axes.axhline(survival["chance"].iloc[0], color=CONTROL, linestyle="--", linewidth=1, label="chance")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share", fontsize=8)
    axes.set_title("Accuracy, and heads that stay", fontsize=9)
    axes.legend(fontsize=7)
