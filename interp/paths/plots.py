"""Figures of paths: heat maps of receivers by sender (or senders by receiver), and the strongest as a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch

from hooks import FrankenlensError
from interp.paths.path import Receiver, parse_sender
from interp.results.palette import EFFECT, INK, MISSING, PALE
from interp.results.picture import LAYER, Picture, nothing

DIRECTIONS = {"rl_to_in": "RL → IN", "in_to_rl": "IN → RL", "donor_to_recipient": "donor → recipient"}
_NO_PATH = "No path was measured."
_MAP = (
    "The direct effect of a sender on each receiver, with all else as it was, {value}; a line a direction, a panel a "
    "{by}. Purple: towards the donor, orange: away from it; the colours grow with the square root. Pale and struck "
    "through: the interval includes 0. Dot: not told apart from the donor's change on another example. Layers and "
    "heads count from 0."
)
_GRAPH = (
    "The strongest direct paths of each direction whose interval excludes 0, as arrows up the layers, {value}: purple "
    "towards the donor, orange away from it, wider where stronger. Dashed: not told apart from the donor on another "
    "example. Layers and heads count from 0."
)
_VALUES = {"recovery": "as a share of the whole difference (recovery)", "direct": "in the metric's units"}
_WIDEST = 4.0  # points, of an arrow


def plot_path_map(table: pd.DataFrame) -> Picture:
    """Direct effects, one line of heat maps per direction: a panel for each sender, or for each receiver if fewer.

    Receivers stand by layer and by q, k, v of heads or MLP, the logits on top; senders by layer, head or MLP, the
    embedding below. Recovery where the table has it, else the effect. Pale and struck through: the interval includes
    0. Dot: not told apart from the donor's change on another example.

    Args:
        table: of `interp.paths.pair.path_table`.
    """
    if table.empty:
        return nothing(_NO_PATH)
    by = "sender" if table["sender"].nunique() <= table["receiver"].nunique() else "receiver"
    key = _value(table)
    across = _receiver_place if by == "sender" else _sender_place
    cells = "receiver" if by == "sender" else "sender"
    panels = list(dict.fromkeys(table[by]))
    directions = list(dict.fromkeys(table["direction"]))
    columns, rows = _axes_of([across(name) for name in dict.fromkeys(table[cells])])
    size = (1.6 + len(panels) * (0.9 + 0.21 * len(columns)), 0.9 + len(directions) * (0.9 + 0.22 * len(rows)))
    figure = Picture(_MAP.format(value=_VALUES[key], by=by), figsize=(max(size[0], 5.0), size[1]))
    grid = figure.subplots(len(directions), len(panels), squeeze=False, sharex=True, sharey=True)
    norm = _scale(table[key].to_numpy())
    for line, direction in zip(grid, directions, strict=True):
        for axes, panel in zip(line, panels, strict=True):
            some = table.loc[(table["direction"] == direction) & (table[by] == panel)]
            places = [across(name) for name in some[cells]]
            _draw(
                axes, some, key, [(rows.index(r), columns.index(c)) for r, c in places], norm, (rows, columns)
            )
            axes.set_title(f"{'from' if by == 'sender' else 'to'} {panel}", fontsize=8)
        n = int(table.loc[table["direction"] == direction, "n"].max())
        line[0].set_ylabel(
            f"{DIRECTIONS.get(direction, direction)} (n = {n})\n{LAYER} of the {cells}", fontsize=8
        )
    _draw_bar(figure, grid, norm, key)
    columns = min(3, max(1, int(figure.get_figwidth() // 2.8)))
    figure.legend(handles=_legend(), loc="outside upper center", ncols=columns, fontsize=7, frameon=False)
    return figure


def plot_path_graph(table: pd.DataFrame, k: int = 12) -> Picture:
    """The `k` strongest paths of each direction whose interval excludes 0, as arrows up the layers.

    Width and colour: recovery where the table has it, else the effect. Dashed: not told apart from the donor's
    change on another example.

    Args:
        table: of `interp.paths.pair.path_table`.
        k: how many.

    Raises:
        FrankenlensError: k is not positive.
    """
    if k < 1:
        raise FrankenlensError(f"k is {k}; give at least 1.")
    if table.empty:
        return nothing(_NO_PATH)
    key = _value(table)
    directions = list(dict.fromkeys(table["direction"]))
    sure = table.loc[_sure(table, key)]
    if sure.empty:
        return nothing("No path's interval excludes 0, so none is drawn.")
    figure = Picture(_GRAPH.format(value=_VALUES[key]), figsize=(0.6 + 4.6 * len(directions), 5.6))
    grid = figure.subplots(1, len(directions), squeeze=False)[0]
    columns, _ = _axes_of([_place(str(name)) for name in {*table["sender"], *table["receiver"]}])
    norm = _scale(sure[key].to_numpy())
    for axes, direction in zip(grid, directions, strict=True):
        one = sure.loc[sure["direction"] == direction]
        one = one.sort_values(key, key=abs, ascending=False, kind="stable").head(k)
        n = int(table.loc[table["direction"] == direction, "n"].max())
        axes.set_title(f"{DIRECTIONS.get(direction, direction)} (n = {n})", fontsize=9)
        _draw_graph(axes, one, columns, key, norm)
    _draw_bar(figure, grid, norm, key)
    dashed = "not told apart from the donor's change on another example"
    handles = [
        Line2D([], [], color=INK, linestyle="--", label=dashed),
        Line2D(
            [],
            [],
            color=INK,
            linestyle="none",
            label="5.h1: head 1 of layer 5, its queries where an arrow ends",
        ),
        Line2D([], [], color=INK, linestyle="none", label="5.k0, 5.v0: keys, values of kv_head 0"),
    ]
    figure.legend(handles=handles, loc="outside upper center", fontsize=7, frameon=False, ncols=3)
    return figure


def _scale(values: np.ndarray) -> Normalize:
    """Symmetric about 0, growing with the square root, so that weak paths show beside strong ones."""
    largest = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    root = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    return FuncNorm(root, vmin=-largest, vmax=largest)


def _draw_bar(figure: Figure, grid: np.ndarray, norm: Normalize, key: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, EFFECT), ax=grid, pad=0.01, aspect=30)
    largest = float(norm.vmax or 1.0)
    marks = [share * largest for share in (-1, -0.25, -0.05, 0, 0.05, 0.25, 1)]
    bar.set_ticks(marks, labels=[f"{mark:.2g}" for mark in marks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label("recovery of the direct path" if key == "recovery" else "direct effect", fontsize=8)


def _value(table: pd.DataFrame) -> str:
    return "recovery" if table["recovery"].notna().any() else "direct"


def _sure(table: pd.DataFrame, key: str) -> np.ndarray:
    return ((table[f"{key}_low"] > 0) | (table[f"{key}_high"] < 0)).to_numpy()


def _beaten(table: pd.DataFrame, key: str) -> np.ndarray:
    """Where the control is told apart, or was not measured."""
    above = (table[key] > 0) & (table["excess_low"] > 0)
    below = (table[key] < 0) & (table["excess_high"] < 0)
    return (above | below | table["excess_low"].isna()).to_numpy()


def _receiver_place(name: str) -> tuple[str, str]:
    """Row and column of a receiver."""
    receiver = Receiver.parse(name)
    if receiver.address is None:
        return "logits", "MLP, logits"
    return str(receiver.layer), "MLP, logits" if receiver.via == "in" else f"{receiver.via}{receiver.index}"


def _sender_place(name: str) -> tuple[str, str]:
    sender = parse_sender(name)
    if sender.layer is None:
        return "embed", "MLP, embed"
    column = "MLP, embed" if sender.sub == "mlp" else "attn" if sender.index is None else f"h{sender.index}"
    return str(sender.layer), column


def _axes_of(places: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Columns from left to right and rows from the bottom up."""
    kinds = {"q": 0, "h": 0, "k": 1, "v": 2, "a": 4, "M": 5, "e": 6, "l": 6}
    columns = sorted(
        {c for _, c in places}, key=lambda c: (kinds[c[0]], int("0" + c[1:] if c[1:].isdigit() else 0))
    )
    ends = {"embed": -1, "logits": 10**6}
    deepest = max((int(r) for r, _ in places if r.isdigit()), default=-1)
    layers = {str(layer) for layer in range(deepest + 1)}  # from 0, whether there is a path or not
    return columns, sorted(
        {r for r, _ in places} | layers, key=lambda r: ends.get(r, int(r) if r.isdigit() else 0)
    )


def _draw(
    axes: Axes,
    some: pd.DataFrame,
    key: str,
    places: Sequence[tuple[int, int]],
    norm: Normalize,
    labels: tuple[list[str], list[str]],
) -> None:
    rows, columns = labels
    axes.set_facecolor(MISSING)
    colours = np.zeros((len(rows), len(columns), 4))
    shades = matplotlib.colormaps[EFFECT](norm(np.nan_to_num(some[key].to_numpy())))
    sure, beaten, known = _sure(some, key), _beaten(some, key), some[key].notna().to_numpy()
    for at, (row, column) in enumerate(places):
        if not known[at]:
            continue
        colours[row, column] = shades[at] if sure[at] else 0.35 * shades[at] + 0.65
        if not sure[at]:
            ends = [column - 0.5, column + 0.5], [row - 0.5, row + 0.5]
            axes.plot(*ends, color=PALE, linewidth=0.4, solid_capstyle="butt")
        elif not beaten[at]:
            axes.plot(column, row, ".", color=INK, markersize=3.5)
    axes.imshow(colours, origin="lower", aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90)
    step = -(-len(rows) // 16)
    axes.set_yticks(range(0, len(rows), step), rows[::step], fontsize=7)
    axes.tick_params(length=2)


def _legend() -> list[Any]:
    return [
        Patch(facecolor="#f7f7f7", edgecolor="0.75", hatch="//", label="interval includes 0"),
        Patch(facecolor=MISSING, label="no such path"),
        Line2D(
            [], [], color=INK, marker=".", linestyle="none",
            label="not told apart from the donor's change on another example",
        ),
    ]  # fmt: skip


def _draw_graph(axes: Axes, one: pd.DataFrame, columns: Sequence[str], key: str, norm: Normalize) -> None:
    axes.set_axis_off()
    if one.empty:
        axes.text(
            0.5, 0.5, "no path's interval excludes 0", ha="center", transform=axes.transAxes, fontsize=9
        )
        return
    top = float(max(one["layer"])) + (one["receiver"] != "logits").all()
    nodes = {
        _short(name): _spot(name, columns, top) for name in dict.fromkeys([*one["sender"], *one["receiver"]])
    }
    beaten = _beaten(one, key)
    for at, row in enumerate(one.to_dict("records")):
        start, stop = nodes[_short(row["sender"])], nodes[_short(row["receiver"])]
        shade = matplotlib.colormaps[EFFECT](float(np.clip(norm(row[key]), 0, 1)))
        strength = abs(row[key]) / float(norm.vmax or 1)
        arrow = FancyArrowPatch(
            start, stop, arrowstyle="-|>", mutation_scale=9, shrinkA=11, shrinkB=11, color=shade,
            connectionstyle=f"arc3,rad={_bend(start[0], stop[0])}",
            linewidth=0.8 + _WIDEST * strength, linestyle="-" if beaten[at] else (0, (3, 1.5)),
        )  # fmt: skip
        axes.add_patch(arrow)
    for name, (x, y) in nodes.items():
        axes.text(
            x, y, name, fontsize=7.5, ha="center", va="center", zorder=5,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "0.5", "linewidth": 0.6},
        )  # fmt: skip
    xs, ys = zip(*nodes.values(), strict=True)
    axes.set_xlim(-0.8, max(len(columns), max(xs) + 1) + 0.8)
    axes.set_ylim(min(ys) - 0.6, max(ys) + 0.6)


def _bend(start: float, stop: float) -> float:
    """Of an arrow, as a share of its length; one that stays in its column goes around what stands there."""
    return 0.45 if start == stop else 0.15 if start < stop else -0.15


def _place(name: str) -> tuple[str, str]:
    """Row and column of a sender or receiver."""
    if name.endswith((".q", ".k", ".v", "logits")):
        row, column = _receiver_place(name)
    else:
        row, column = _sender_place(name)
    return row, column.split(",")[0].replace("q", "h")  # a head receives by its queries


def _spot(name: str, columns: Sequence[str], top: float) -> tuple[float, float]:
    """Columns as in the heat map; MLPs half a layer up."""
    row, column = _place(name)
    if row in ("embed", "logits"):
        return (len(columns) - 1) / 2, -0.8 if row == "embed" else top
    return float(columns.index(column)), float(row) + 0.45 * (column == "MLP")


def _short(name: str) -> str:
    """E.g. 5.h1, 5.k0, 5.MLP, 5.attn."""
    row, column = _place(name)
    return row if row in ("embed", "logits") else f"{row}.{column}"
