"""Figures of `confirmation`: accuracy gained and lost, and whose trace was written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from interp.results.palette import CONTROL, INK, MIXED, of_model
from interp.results.picture import Picture, nothing

_CONFIRMATION = (
    "Change of accuracy against the recipient, in points, when the donor's activations of the chosen components are "
    "moved into it at every generated token, with paired 95 % intervals; a panel a direction. Filled: p corrected "
    "below 0.05. Diamonds, grey: random components of equal number and kind. Dashed, in the donor's colour: the "
    "donor's own accuracy."
)
_FOLLOWED = (
    "Share of traces that are, token for token, what RL writes by itself (red) or what IN does (blue), for every set "
    "of moved components; the rest is neither's. Both bars count a trace that the two models write alike."
)
TITLES = {"rl_to_in": "moved in: RL's activations in IN", "in_to_rl": "moved out: IN's activations in RL"}
_NAMES = {"rl_to_in": ("RL", "IN"), "in_to_rl": ("IN", "RL")}


def plot_confirmation(table: pd.DataFrame, function: str) -> Picture:
    """Change of accuracy against the recipient, in points, with paired 95 % intervals; one panel per direction.

    Filled: p corrected is below 0.05. Grey: each random set. Dashed: the donor's own accuracy.

    Args:
        table: what `interp.lockstep.confirmation` returns.
        function: the task that is shown, "all" for all together.
    """
    own = table.loc[table["function"] == function]
    if own.empty:
        return nothing("No component was moved on any question.")
    directions, groups = list(dict.fromkeys(own["direction"])), list(dict.fromkeys(own["group"]))
    figure = Picture(_CONFIRMATION, figsize=(1.6 + 3.6 * len(directions), 1.3 + 0.75 * len(groups)))
    grid = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for axes, direction in zip(grid, directions, strict=True):
        some = own.loc[own["direction"] == direction]
        for place, group in zip(range(len(groups) - 1, -1, -1), groups, strict=True):
            _draw_group(axes, some.loc[some["group"] == group], float(place))
        first = some.iloc[0]
        donor, recipient = _NAMES[direction]
        axes.axvline(0, color=INK, linewidth=0.8, zorder=0)
        gap = 100 * (first["donor"] - first["recipient"])
        axes.axvline(gap, color=of_model(donor), linestyle="--", linewidth=1.1)
        axes.set_title(
            f"{TITLES[direction]}\n{recipient} {100 * first['recipient']:.1f} %, {donor} "
            f"{100 * first['donor']:.1f} % (n = {first['n']})",
            fontsize=9, loc="left",
        )  # fmt: skip
        axes.set_xlabel(f"accuracy − {recipient}'s, points", fontsize=8)
        _plain(axes)
    grid[0].set_yticks(np.arange(float(len(groups)))[::-1], [_label(own, g) for g in groups], fontsize=8)
    grid[0].set_ylim(-0.6, len(groups) - 0.4)
    marks = [
        _mark("o", MIXED, MIXED, "chosen, p corrected < 0.05"),
        _mark("o", MIXED, "white", "chosen, not told from the recipient"),
        Line2D([], [], color=INK, linestyle="--", linewidth=0.9, label="the donor itself, in its colour"),
    ]
    if (own["draw"] >= 0).any():
        marks.insert(2, _mark("D", CONTROL, CONTROL, "control: random, of equal number and kind"))
    figure.legend(handles=marks, loc="outside upper left", fontsize=7, frameon=False, ncols=2)
    return figure


def plot_followed(table: pd.DataFrame, function: str) -> Picture:
    """Share of traces that are, token for token, the donor's own or the recipient's; the rest is neither's.

    Args:
        table, function: as in `plot_confirmation`.
    """
    own = table.loc[(table["function"] == function) & (table["draw"] <= 0)]
    if own.empty:
        return nothing("No component was moved on any question.")
    directions, names = list(dict.fromkeys(own["direction"])), list(dict.fromkeys(own["condition"]))
    figure = Picture(_FOLLOWED, figsize=(1.8 + 3.3 * len(directions), 1.2 + 0.33 * len(names)))
    grid = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    places = np.arange(float(len(names)))[::-1]
    for axes, direction in zip(grid, directions, strict=True):
        some = own.loc[own["direction"] == direction].set_index("condition").loc[names]
        sides = zip((0.19, -0.19), ("donor", "recipient"), _NAMES[direction], strict=True)
        for offset, parent, model in sides:
            share = 100 * some[f"whole_{parent}"]
            axes.barh(places + offset, share, height=0.34, color=of_model(model), alpha=0.85)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of traces (both, where the two write the same)", fontsize=8)
        axes.set_title(TITLES[direction], fontsize=9, loc="left")
        _plain(axes)
    grid[0].set_yticks(places, names, fontsize=8)
    patches = [Patch(color=of_model(name), alpha=0.85, label=f"{name}'s own trace") for name in ("RL", "IN")]
    figure.legend(handles=patches, loc="outside upper left", fontsize=7, frameon=False, ncols=2)
    return figure


def _draw_group(axes: Axes, some: pd.DataFrame, place: float) -> None:
    chosen = some.loc[some["draw"] < 0].iloc[0]
    told = bool(chosen["p_corrected"] < 0.05)
    _interval(axes, chosen, place + 0.2, "o", MIXED, MIXED if told else "white", 5.0)
    drawn = some.loc[some["draw"] >= 0]
    for at, (_, row) in zip(_spread(len(drawn)), drawn.iterrows(), strict=True):
        _interval(axes, row, place + at, "D", CONTROL, CONTROL, 3.0)


def _spread(n: int) -> Sequence[float]:
    return np.linspace(-0.02, -0.36, n).tolist() if n > 1 else [-0.1] * n


def _interval(
    axes: Axes, row: pd.Series, place: float, marker: str, colour: str, face: str, size: float
) -> None:
    value, low, high = (100 * row[name] for name in ("change", "change_low", "change_high"))
    axes.plot([low, high], [place, place], color=colour, linewidth=1.3 if size > 4 else 0.8)
    axes.plot([value], [place], marker, color=colour, markerfacecolor=face, markersize=size)


def _label(own: pd.DataFrame, group: str) -> str:
    row = own.loc[(own["group"] == group) & (own["draw"] < 0)].iloc[0]
    components = str(row["components"])
    if row["size"] == 1:
        return components if components == group else f"{group}\n{components}"
    return f"{group}\n{row['size']} components"


def _mark(marker: str, colour: str, face: str, label: str) -> Line2D:
    return Line2D([], [], marker=marker, color=colour, markerfacecolor=face, linestyle="none", markersize=4,
                  label=label)  # fmt: skip


def _plain(axes: Axes) -> None:
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
