"""A forest plot of a transfer: what each variant gains over IN, with its interval, and its controls beside it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from interp.results.palette import CONTROL, INK, MIXED, PALE, RL, of_model
from interp.results.picture import Picture, nothing

_CONTROLS = {"random update": ("D", CONTROL), "random layers": ("s", PALE)}
_CAPTION = (
    "What each variant (IN with some of RL's weights) gains over IN, in points of accuracy or of the metric, with its "
    "paired 95 % interval; a panel per metric and group of questions. Filled: differs from IN, p corrected "
    "below 0.05 (of whole models p is not corrected). Below a variant, in grey: its controls. Band: RL with its "
    "interval. Base is in the table alone, so that the variants keep their scale."
)


def plot_transfer(table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> Picture:
    """Difference to IN of every variant, in points of accuracy, one panel per metric and task.

    Filled: p corrected is below 0.05 (of models: p). Grey: the variant's controls. Band: RL with its interval. Base is
    left out, so that the differences between variants keep their scale.

    Args:
        table: what `interp.transfer.table.transfer_table` returns.
        cells: (metric, task) of the panels.
    """
    if not cells or table.empty:
        return nothing("No variant was measured on any question.")
    panels = [table.loc[(table["metric"] == m) & (table["task"] == task)] for m, task in cells]
    names = [
        name
        for name in panels[0].loc[panels[0]["kind"] != "control", "variant"]
        if name not in ("IN", "Base")
    ]
    figure = Picture(_CAPTION, figsize=(1.9 + 3.1 * len(cells), 1.2 + 0.32 * len(names)))
    grid = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for axes, panel, (metric, task) in zip(grid, panels, cells, strict=True):
        _draw(axes, panel, names)
        own = panel.loc[panel["variant"] == "IN"].iloc[0]
        title = task if len({m for m, _ in cells}) == 1 and task else f"{metric} {task}".strip()
        axes.set_title(f"{title}\nIN {100 * own['value']:.1f} % (n = {own['n']})", fontsize=9, loc="left")
    grid[0].set_yticks(np.arange(float(len(names)))[::-1], names, fontsize=8)
    grid[0].set_ylim(-0.7, len(names) - 0.3)
    beside = table.loc[table["kind"] == "control", "variant"]
    _legend(figure, [what for what in _CONTROLS if beside.str.contains(what, regex=False).any()])
    return figure


def _draw(axes: Axes, panel: pd.DataFrame, names: Sequence[str]) -> None:
    rl = panel.loc[panel["variant"] == "RL"].iloc[0]
    axes.axvline(0, color=INK, linewidth=0.8, zorder=0)
    axes.axvspan(100 * rl["change_low"], 100 * rl["change_high"], color=RL, alpha=0.1, linewidth=0)
    by_name = panel.set_index("variant")
    for place, name in zip(range(len(names) - 1, -1, -1), names, strict=True):
        row = by_name.loc[name]
        p = row["p"] if row["kind"] == "model" else row["p_adjusted"]
        colour = of_model(name) if row["kind"] == "model" else MIXED
        _interval(axes, row, place + 0.13, "o", colour, bool(p < 0.05))
        beside = panel.loc[panel["control_of"] == name]
        for _, control in beside.iterrows():
            which = next(i for i, what in enumerate(_CONTROLS) if what in str(control["variant"]))
            marker, colour = _CONTROLS[list(_CONTROLS)[which]]
            _interval(axes, control, place - 0.11 - 0.2 * which, marker, colour, True, size=3.0)
    kinds = [by_name.loc[name, "kind"] for name in names]
    for i in np.flatnonzero([a != b for a, b in pairwise(kinds)]):
        axes.axhline(len(names) - 1.5 - i, color="0.85", linewidth=0.6, zorder=0)
    axes.set_xlabel("accuracy − IN's, points", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _interval(
    axes: Axes, row: pd.Series, place: float, marker: str, colour: str, filled: bool, size: float = 4.5
) -> None:
    value, low, high = (100 * row[name] for name in ("change", "change_low", "change_high"))
    axes.plot([low, high], [place, place], color=colour, linewidth=1.2)
    face = colour if filled else "white"
    axes.plot([value], [place], marker, color=colour, markerfacecolor=face, markersize=size, linestyle="none")


def _legend(figure: Figure, controls: Sequence[str]) -> None:
    def mark(marker: str, colour: str, face: str, label: str) -> Line2D:
        return Line2D(
            [],
            [],
            marker=marker,
            color=colour,
            markerfacecolor=face,
            linestyle="none",
            markersize=4,
            label=label,
        )

    entries = [
        mark("o", MIXED, MIXED, "differs from IN, p corrected < 0.05"),
        mark("o", MIXED, "white", "not told from IN"),
        mark("o", RL, RL, "RL itself (p not corrected)"),
    ]
    for name in controls:
        marker, grey = _CONTROLS[name]
        entries.append(mark(marker, grey, grey, f"control: {name}"))
    entries.append(Line2D([], [], color=RL, alpha=0.15, linewidth=7, label="RL, 95 % interval"))
    columns = min(3, max(1, int(figure.get_figwidth() // 2.4)))
    figure.legend(handles=entries, loc="outside upper left", fontsize=7, frameon=False, ncols=columns)
