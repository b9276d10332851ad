"""The component map as a figure for a paper, and its strongest components with intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from interp.map.summary import headline, strongest
from interp.results.palette import CONTROL, EFFECT, INK, MISSING, MIXED, PALE
from interp.results.picture import LAYER, Picture, nothing
from interp.statistics import MIN_SHOWN, interval_text

DIRECTIONS = {
    "rl_to_in": "RL → IN: is it sufficient?",
    "in_to_rl": "IN → RL: is it necessary?",
}
TITLES = {
    "resid_pre": "residual stream",
    "attn_out": "attention",
    "cross_attn_out": "cross-attention",
    "mixer_out": "mixers",
    "mlp_out": "MLP",
    "head": "heads",
    "z": "heads before $W_O$",
    "expert": "experts",
    "vision": "vision",
}
_ROLES = ("image", "question", "template", "reasoning", "answer", "decision", "all")
_MAP = (
    "Recovery when the donor's activation of one component is put into the other model, at the tokens of one role: 1 "
    "(deep purple) brings the donor's decision, 0 changes nothing, orange goes against it; the colours grow with the "
    "square root. A line a direction; maps of layer by role, and of layer by head at the decision. Pale and struck "
    "through: not beyond control, since random directions as large{noise} do as much. Grey: no example has such "
    "tokens. Layers, heads and vision blocks count from 0."
)
_STRONGEST = (
    "The components whose {what} lie farthest above their controls in one direction, each at the tokens where it does, "
    "with its interval (purple; open: not beyond control), random directions as large (grey), and what noise pairs "
    "reach (tick). Fewer than {fewest} examples have no interval. They are the strongest of many, so biased upward. "
    "Layers and heads count from 0."
)


@dataclass(frozen=True)
class _Panel:
    """One heat map: rows from the bottom up."""

    title: str
    across: str
    up: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    recovery: Float[np.ndarray, "row column"]
    unsure: Bool[np.ndarray, "row column"]


def plot_map(summary: xr.Dataset) -> Picture:
    """Recovery of every component, one line of heat maps per direction.

    Layer by role for the residual stream, attention and MLP; layer by head at the decision; vision blocks and
    projector. One diverging colour scale (square root, so that single heads show beside whole layers). Pale and
    struck through: not beyond control (`interp.map.summary`: random directions as large, or noise pairs, do as much).
    Grey: no example has such tokens. Where recovery is refused, the figure holds the reason and no map.

    Args:
        summary: what `interp.map.summary.summarise` returns.
    """
    if summary.attrs["refused"]:
        return _refusal(summary)
    directions = [str(name) for name in summary["direction"].to_numpy()]
    panels = {name: _panels(summary.sel(direction=name)) for name in directions}
    widths = [1.1 + 0.21 * len(panel.columns) for panel in panels[directions[0]]]
    tallest = max(len(panel.rows) for panel in panels[directions[0]])
    height = 1.45 + min(0.24 * tallest, 5.5)
    text = textwrap.wrap(denominator_text(summary), int(16 * sum(widths)))
    notes = 3 if sum(widths) > 6.5 else 1  # of the legend, side by side
    heights = [0.15 + 0.17 * len(text), *[height] * len(directions), 0.2 + 0.5 / notes]
    caption = _MAP.format(noise=" or noise pairs" if "floor" in summary else "")
    figure = Picture(caption, figsize=(sum(widths) + 1.2, sum(heights)))
    head, *lines, legend = _stacked(figure, heights)
    head.text(0.01, 0.5, "\n".join(text), va="center", fontsize=9)
    norm = _scale(summary)
    for line, name in zip(lines, directions, strict=True):
        line.suptitle(_direction_title(summary, name), x=0.01, ha="left", fontsize=9, fontweight="bold")
        grid = list(np.atleast_1d(line.subplots(1, len(panels[name]), width_ratios=widths)))
        for axes, panel in zip(grid, panels[name], strict=True):
            _draw_panel(axes, panel, norm)
        _draw_bar(line, grid, norm)
    _draw_legend(legend, summary, notes)
    return figure


def plot_strongest(summary: xr.Dataset, direction: str, k: int = 10) -> Picture:
    """The `k` strongest components (`interp.map.summary.strongest`) with intervals, beside the controls.

    Random directions as large have no sign, and stand on the side of what they are compared with; a tick is the floor
    of noise pairs. An open circle is not beyond control. Where recovery is refused, the effects are shown instead, in
    the metric's units.

    Args:
        summary: what `interp.map.summary.summarise` returns.
        direction: one of the map's.
        k: how many.
    """
    table = strongest(summary, direction, k)
    refused = bool(summary.attrs["refused"])
    if table.empty:
        return nothing("No component was patched on any example.")
    caption = _STRONGEST.format(what="effects" if refused else "recoveries", fewest=MIN_SHOWN)
    figure = Picture(caption, figsize=(6.8, 1.0 + 0.32 * len(table)))
    axes = figure.add_subplot()
    places = np.arange(float(len(table)))[::-1]
    axes.axvline(0, color=CONTROL, linewidth=0.8, zorder=0)
    if refused:
        _draw_intervals(axes, table, "effect_mean", places, MIXED, "the donor on this example")
    else:
        side = np.sign(table["recovery"].to_numpy())
        _draw_intervals(
            axes, table, "random_recovery", places - 0.2, CONTROL, "random directions as large", side
        )
        _draw_intervals(axes, table, "recovery", places + 0.12, MIXED, "the donor on this example")
        if "floor" in table:
            reach = side * _in_recovery(summary, direction, table["floor"].to_numpy())
            axes.plot(reach, places, "|", color=INK, markersize=9, label="noise pairs")
        below = ~table["beyond"].to_numpy(bool)
        label = "not beyond control" if below.any() else None
        style = {"color": MIXED, "mfc": "white", "markersize": 4, "label": label, "zorder": 3}
        axes.plot(table["recovery"].to_numpy()[below], places[below] + 0.12, "o", **style)
        figure.legend(loc="outside lower right", fontsize=7, frameon=False, ncols=4)
    labels = [
        f"{component}  ·  {role}" for component, role in zip(table["component"], table["role"], strict=True)
    ]
    axes.set_yticks(places, labels, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"patched − recipient ({summary.attrs['units']})" if refused else "recovery", fontsize=8)
    axes.set_title(_direction_title(summary, direction), fontsize=9, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def denominator_text(summary: xr.Dataset) -> str:
    """What a recovery of 1 is worth, with its interval, beside pairs that learnt nothing."""
    what, found = headline(summary)
    text = f"{what} = {interval_text(found.value, found.low, found.high)} {summary.attrs['units']}"
    if "null" in summary.dims:
        ends = (summary["null_denominator" + suffix].to_numpy() for suffix in ("", "_low", "_high"))
        nulls = zip(summary["null"].to_numpy(), *ends, strict=True)
        text += ". Pairs that learnt nothing: "
        text += "; ".join(f"{name} {interval_text(*interval)}" for name, *interval in nulls)
    return text


def _direction_title(summary: xr.Dataset, direction: str) -> str:
    n = int(summary["n"].sel(direction=direction).max())
    return f"{DIRECTIONS.get(direction, direction)}   (n = {n})"


def _refusal(summary: xr.Dataset) -> Picture:
    return nothing(f"No recovery is given: {summary.attrs['refused']}. {denominator_text(summary)}.")


def _stacked(figure: Figure, heights: Sequence[float]) -> list[SubFigure]:
    return list(np.atleast_1d(np.asarray(figure.subfigures(len(heights), 1, height_ratios=list(heights)))))


def _draw_intervals(
    axes: Axes,
    table: pd.DataFrame,
    name: str,
    places: Float[np.ndarray, " k"],
    colour: str,
    label: str,
    side: Float[np.ndarray, " k"] | float = 1.0,
) -> None:
    value, low, high = (side * table[name + suffix].to_numpy() for suffix in ("", "_low", "_high"))
    reach = np.stack([value - np.minimum(low, high), np.maximum(low, high) - value])
    # a missing interval (too few examples) is drawn as a bare point
    axes.errorbar(
        value,
        places,
        xerr=np.nan_to_num(reach),
        fmt="o",
        color=colour,
        markersize=4,
        linewidth=1.2,
        label=label,
    )


def _in_recovery(
    summary: xr.Dataset, direction: str, nats: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    return nats / abs(float(summary["denominator"].sel(direction=direction)))


def _panels(one: xr.Dataset) -> list[_Panel]:
    """The heat maps of one direction, those points that the map has, in reading order."""
    points = one["point"].to_numpy()
    of_layers = ("resid_pre", "attn_out", "cross_attn_out", "mixer_out", "mlp_out")
    found = [_by_role(one, point) for point in of_layers if point in points]
    found += [_by_head(one, point) for point in ("head", "z", "expert") if point in points]
    if np.isin(points, ["vision", "projector"]).any():
        found.append(_vision(one))
    return found


def _by_role(one: xr.Dataset, point: str) -> _Panel:
    part = one.isel(component=one["point"].to_numpy() == point)
    roles = [role for role in _ROLES if role in part["role"].to_numpy()]
    roles += [str(role) for role in part["role"].to_numpy() if role not in roles]
    part = part.sel(role=roles).sortby("layer").transpose("component", "role", ...)
    layers = tuple(str(layer) for layer in part["layer"].to_numpy())
    return _Panel(TITLES[point], "tokens", LAYER, layers, tuple(roles), *_cells(part))


def _by_head(one: xr.Dataset, point: str) -> _Panel:
    part = one.isel(component=one["point"].to_numpy() == point)
    role = "decision" if "decision" in part["role"].to_numpy() else str(part["role"].to_numpy()[-1])
    part = part.sel(role=role)
    layer, head = part["layer"].to_numpy().astype(int), part["head"].to_numpy().astype(int)
    shape = (layer.max() + 1, head.max() + 1)
    grids = np.full(shape, np.nan), np.zeros(shape, bool)
    for grid, cells in zip(grids, _cells(part), strict=True):
        grid[layer, head] = cells
    rows, columns = (tuple(str(i) for i in range(n)) for n in shape)
    across = "expert" if point == "expert" else "head"
    return _Panel(f"{TITLES[point]}, {role}", across, LAYER, rows, columns, *grids)


def _vision(one: xr.Dataset) -> _Panel:
    part = one.isel(component=np.isin(one["point"].to_numpy(), ["vision", "projector"]))
    kept = [role for role in part["role"].to_numpy() if (part["n"].sel(role=role) > 0).any()]
    part = part.sel(role=kept or [str(part["role"].to_numpy()[0])]).transpose("component", "role", ...)
    rows = tuple(str(name).replace("vision.blocks.", "") for name in part["component"].to_numpy())
    columns = tuple(str(role) for role in part["role"].to_numpy())
    return _Panel(TITLES["vision"], "tokens", "block (from 0)", rows, columns, *_cells(part))


def _cells(part: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Recovery, and whether it is not beyond control."""
    recovery = part["recovery"].to_numpy()
    return recovery, ~np.isnan(recovery) & ~part["beyond"].to_numpy()


def _scale(summary: xr.Dataset) -> Normalize:
    """Symmetric about 0, at least to ±1 and at most to ±1.5, growing with the square root."""
    size = np.abs(summary["recovery"].to_numpy())
    reach = float(np.clip(np.nanmax(size), 1.0, 1.5)) if np.isfinite(size).any() else 1.0
    root = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    return FuncNorm(root, vmin=-reach, vmax=reach)


def _draw_bar(line: SubFigure, axes: list[Axes], norm: Normalize) -> None:
    colours = ScalarMappable(norm, EFFECT)
    bar = line.colorbar(colours, ax=axes, extend="both", pad=0.01, aspect=28, shrink=0.9)
    bar.set_ticks([-1, -0.5, -0.2, -0.05, 0, 0.05, 0.2, 0.5, 1])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label("recovery", fontsize=8)


def _draw_panel(axes: Axes, panel: _Panel, norm: Normalize) -> None:
    axes.set_facecolor(MISSING)
    colours = matplotlib.colormaps[EFFECT](norm(np.nan_to_num(panel.recovery)))
    pale = panel.unsure[..., None]
    colours = np.where(pale, 0.35 * colours + 0.65, colours)
    colours[..., 3] = ~np.isnan(panel.recovery)
    axes.imshow(colours, origin="lower", aspect="auto", interpolation="nearest")
    for row, column in np.argwhere(panel.unsure):
        axes.plot(
            [column - 0.5, column + 0.5],
            [row - 0.5, row + 0.5],
            color=PALE,
            linewidth=0.4,
            solid_capstyle="butt",
        )
    axes.set_title(panel.title, fontsize=8)
    step = -(-len(panel.rows) // 14)
    axes.set_yticks(range(0, len(panel.rows), step), panel.rows[::step], fontsize=7)
    step = -(-len(panel.columns) // 16)
    words = panel.across == "tokens"
    axes.set_xticks(
        range(0, len(panel.columns), step), panel.columns[::step], fontsize=7, rotation=90 if words else 0
    )
    axes.set_ylabel(panel.up, fontsize=7)
    if not words:
        axes.set_xlabel(panel.across, fontsize=7)
    axes.tick_params(length=2)


def _draw_legend(legend: SubFigure, summary: xr.Dataset, columns: int) -> None:
    matched = "not beyond control: random directions as large" + (
        " or noise pairs do as much" if "floor" in summary else " do as much (no noise pairs were run)"
    )
    legend.legend(
        handles=[
            Patch(facecolor="#f7f7f7", edgecolor=PALE, hatch="//", label=matched),
            Patch(facecolor=MISSING, label="no example has such tokens"),
        ],
        loc="center left",
        ncols=columns,
        fontsize=7,
        frameon=False,
    )
