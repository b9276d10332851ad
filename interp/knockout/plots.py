"""Routes as figures: curves over the layers, and the flow from image to question to the last token (2411.18620)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from interp.results.palette import CONTROL, IN, INK, MISSING, RL
from interp.results.picture import Picture, nothing

BEFORE, AFTER = IN, RL
SIDES = (("before", BEFORE), ("after", AFTER))
ORDER = ("image", "question", "before reasoning", "reasoning", "last")
_WIDEST = 9.0  # points
_CUT = "layers that are cut (from 0)"
_NO_ROUTE = "No route was cut in any layer."
_ROUTES = (
    "What cutting a route does to the metric, by the layers in which it is cut: IN blue, RL red, with 95 % intervals; "
    "a panel a route. Dashed: as many random edges, cut in the same layers. Stars on the zero line: the two models "
    "differ, p corrected below 0.05. Layers count from 0."
)
_FLOW = (
    "Where information flows towards the answer: an arrow a route and window of layers, as wide as the harm that "
    "cutting it does; above IN (blue), then RL (red). Pale: the interval includes 0, or random edges do as much harm. "
    "Below, where p corrected is below 0.05: red arrows are routes that RL needs more, blue ones those that IN does. "
    "Layers count from 0."
)


def plot_routes(table: pd.DataFrame) -> Picture:
    """The effect of cutting each route, by window of layers, in both models.

    Bands: intervals. Dashed: random edges, as many, in the same layers. Marks on the zero line: the two models differ,
    p corrected below 0.05.

    Args:
        table: what `interp.knockout.route_table` returns.
    """
    if table.empty:
        return nothing(_NO_ROUTE)
    names = list(dict.fromkeys(table["route"]))
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure = Picture(_ROUTES, figsize=(3.1 * across + 0.6, 2.2 * down + 0.9))
    grid = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for axes, name in zip(grid, names, strict=False):
        _curves(axes, table.loc[table["route"] == name])
        axes.set_title(str(name).replace("->", "→"), fontsize=9, loc="left")
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for place, axes in enumerate(grid[: len(names)]):
        if place % across == 0:
            axes.set_ylabel(f"cut − clean ({table.attrs['units']})", fontsize=8)
        if place + across >= len(names):
            axes.tick_params(axis="x", labelbottom=True)
            axes.set_xlabel(_CUT, fontsize=8)
    before, after = (str(model).upper() for model in table.attrs["models"])
    entries = [
        Line2D([], [], color=BEFORE, label=before),
        Line2D([], [], color=AFTER, label=after),
        Line2D([], [], color=CONTROL, linestyle="--", label="random edges, as many (both models)"),
        Line2D([], [], color=INK, marker="*", linestyle="none", label="models differ, p corrected < 0.05"),
    ]
    figure.legend(handles=entries, loc="outside upper left", fontsize=7, frameon=False, ncols=4)
    return figure


def _curves(axes: Axes, some: pd.DataFrame) -> None:
    places = np.arange(len(some))
    axes.axhline(0, color=INK, linewidth=0.7, zorder=0)
    for side, colour in SIDES:
        axes.fill_between(
            places, some[f"{side}_low"], some[f"{side}_high"], color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(places, some[side], color=colour, linewidth=1.5, marker="o", markersize=3)
        axes.plot(places, some[f"{side}_control"], color=colour, alpha=0.6, linewidth=1, linestyle="--")
    sure = some["p_corrected"].to_numpy() < 0.05
    axes.plot(places[sure], np.zeros(sure.sum()), "*", color=INK, markersize=6)
    step = -(-len(some) // 10)
    axes.set_xticks(places[::step], some["window"].tolist()[::step], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def plot_flow(table: pd.DataFrame, routes: Sequence[str] | None = None) -> Picture:
    """The flow of information towards the answer, layer by layer: one line for each place, an arrow for each route.

    An arrow is as wide as the harm that cutting its route does in a window of layers; pale where the interval of the
    effect includes 0, or where the effect lies within or above the interval of as many random edges. Below: the second
    model less the first, drawn where p corrected is below 0.05.

    Args:
        table: what `interp.knockout.route_table` returns.
        routes: which to draw; by default all.
    """
    chosen = table if routes is None else table.loc[table["route"].isin(list(routes))]
    if chosen.empty:
        return nothing(_NO_ROUTE)
    models = [str(model).upper() for model in table.attrs["models"]]
    places = _places(chosen)
    windows = list(dict.fromkeys(chosen["window"]))
    width = 2.2 + 0.75 * len(windows)
    figure = Picture(_FLOW, figsize=(width, 0.7 + 3 * (0.7 + 0.42 * len(places))))
    told = chosen["p_corrected"] < 0.05
    panels = list(figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1 if told.any() else 0.12)))
    harm = max(-chosen[["before", "after"]].to_numpy().min(), 1e-12)
    units = table.attrs["units"]
    for axes, (side, colour), model in zip(panels, SIDES, models, strict=False):
        sure = (chosen[f"{side}_high"] < 0) & (chosen[side] < chosen[f"{side}_control_low"])
        _arrows(axes, chosen.assign(size=-chosen[side] / harm, sure=sure, colour=colour), places, windows)
        axes.set_title(
            f"{model}: harm of a cut (pale: not told from 0 or from random edges); widest: {harm:.2g} {units}",
            fontsize=8,
            loc="left",
            color=colour,
        )
    if not told.any():
        return _without_difference(figure, panels, models)
    most = max(chosen["difference"].abs()[told].max(), 0.0)
    colours = np.where(chosen["difference"] < 0, AFTER, BEFORE)
    size = chosen["difference"].abs().where(told, 0.0) / (most or 1.0)
    _arrows(panels[2], chosen.assign(size=size, sure=told, colour=colours), places, windows)
    widest = f"; widest: {most:.2g} {units}"
    panels[2].set_title(
        f"{models[1]} − {models[0]} where p corrected < 0.05 (red: {models[1]} needs the route more){widest}",
        fontsize=8,
        loc="left",
    )
    panels[2].set_xlabel(_CUT, fontsize=8)
    return figure


def _without_difference(figure: Picture, panels: Sequence[Axes], models: Sequence[str]) -> Picture:
    """Both models, and a sentence in place of their difference."""
    *above, below = panels
    below.set_axis_off()
    why = f"{models[1]} − {models[0]}: no route's difference is told from 0 (p corrected < 0.05)."
    below.text(0, 0.5, why, fontsize=8, va="center", transform=below.transAxes)
    above[-1].tick_params(axis="x", labelbottom=True)
    above[-1].set_xlabel(_CUT, fontsize=8)
    return figure


def _places(table: pd.DataFrame) -> list[str]:
    """Sources and targets from the bottom up, in the order in which they stand in the text."""
    ends = dict.fromkeys(end for route in table["route"] for end in str(route).split(" -> "))
    return sorted(ends, key=lambda end: (ORDER.index(end) if end in ORDER else len(ORDER), end))


def _arrows(axes: Axes, table: pd.DataFrame, places: Sequence[str], windows: Sequence[str]) -> None:
    """One arrow per row: its `size` (1: the widest), `colour`, and whether it is `sure`."""
    for height, place in enumerate(places):
        axes.axhline(height, color=MISSING, linewidth=5, zorder=0, solid_capstyle="butt")
        axes.text(-0.75, height, place, fontsize=8, ha="right", va="center")
    names = list(dict.fromkeys(table["route"]))
    for row in table.to_dict("records"):
        if not row["size"] > 0.01:
            continue
        source, target = (places.index(end) for end in str(row["route"]).split(" -> "))
        at = windows.index(row["window"]) + 0.7 * (names.index(row["route"]) + 0.5) / len(names) - 0.35
        line = _WIDEST * row["size"]
        head = f"-|>,head_length={2 + 0.4 * line},head_width={1.2 + 0.45 * line}"
        arrow = FancyArrowPatch(
            (at - 0.04, source),
            (at + 0.04, target),
            arrowstyle=head,
            linewidth=max(0.5, line),
            color=row["colour"],
            alpha=0.85 if row["sure"] else 0.22,
            shrinkA=3,
            shrinkB=3,
            mutation_scale=1,
            joinstyle="miter",
            capstyle="butt",
        )
        axes.add_patch(arrow)
    axes.set_xlim(-0.7, len(windows) - 0.3)
    axes.set_ylim(-0.5, len(places) - 0.5)
    axes.set_xticks(range(len(windows)), windows, fontsize=7)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
