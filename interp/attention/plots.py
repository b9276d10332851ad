"""Figures of the attention shift: IN and RL along the layers with their paired difference, and heads."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from interp.attention.shift import PAIR
from interp.localization.plots import ALPHA, draw_heads, shade_regions
from interp.regions import Partition
from interp.results.palette import DIFFERENCE, IN, INK, NULLS, PALE, RL
from interp.results.picture import LAYER, Picture, along_layers, nothing

TITLES = {"own": "each model's own traces", "in": "both on IN's traces", "rl": "both on RL's traces"}
_COLOURS = {"before": IN, "after": RL}
_MARKS = ("x", "+", "1")
_SHIFT = (
    "Attention to the {keys} tokens per layer, {what}, mean over heads, tokens and questions: above in IN and in RL, "
    "below their paired difference, with 95 % intervals; a column a choice of traces. Filled: the difference "
    "is told from 0, p corrected below 0.05. Crosses, grey: models that learnt nothing, on the same traces. Shaded: "
    "the regions of the decoder. Layers count from 0."
)
_WHAT = {"mass": "the mass (to all of them together)", "mean": "the mean (to one of them)"}
_HEADS = (
    "RL − IN of the attention to the {keys} tokens, per head (red: RL looks more, blue: IN does); a map a choice of "
    "traces. Pale and struck through: not told from 0 after correction. Layers and heads count from 0."
)


def plot_shift(
    table: pd.DataFrame, partition: Partition, measure: str = "mass", looked_at: str = "image"
) -> Picture:
    """Per layer: attention of IN and of RL above, their paired difference below; a column per choice of traces.

    Filled: differs from 0 after correction. Crosses: models that learnt nothing.

    Args:
        table: `interp.attention.shift.shift` per layer, with columns `traces`, `comparison` and `measure`.
        partition: its regions are shaded.
        measure: of the table.
        looked_at: role of the tokens that attention goes to, in words.
    """
    table = table.loc[table["measure"] == measure]
    if not (table["comparison"] == PAIR).any():
        return nothing("No question has a usable trace of both models, so no attention is compared.")
    traces = [str(name) for name in dict.fromkeys(table["traces"])]
    figure = Picture(
        _SHIFT.format(what=_WHAT.get(measure, measure), keys=looked_at),
        figsize=(3.3 * len(traces) + 0.6, 5.4),
    )
    grid = figure.subplots(2, len(traces), squeeze=False, sharex=True, sharey="row")
    for (above, below), name in zip(grid.T, traces, strict=True):
        some = table.loc[table["traces"] == name]
        own = some.loc[some["comparison"] == PAIR].sort_values("layer")
        for axes in (above, below):
            shade_regions(axes, partition)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        for side, label in (("before", "IN"), ("after", "RL")):
            _band(above, own, side, label)
        _differences(below, some, own)
        above.set_title(f"{TITLES.get(name, name)}  (n = {int(own['n'].max())})", fontsize=9)
        along_layers(below, own["layer"])
        above.margins(y=0.12)
        below.margins(y=0.12)
    grid[0][0].set_ylabel(f"attention to {looked_at} tokens, {measure}", fontsize=8)
    grid[1][0].set_ylabel(f"{PAIR}, paired", fontsize=8)
    lines, differences = (axes.get_legend_handles_labels() for axes in (grid[0][0], grid[1][-1]))
    handles, labels = [*lines[0], *differences[0]], [*lines[1], *differences[1]]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    return figure


def plot_head_shift(table: pd.DataFrame, looked_at: str = "image") -> Picture:
    """RL − IN per head, a map per choice of traces; pale and struck through: not told from 0 after correction.

    Args:
        table: `interp.attention.shift.shift` per head, with columns `traces` and `comparison`.
        looked_at: as in `plot_shift`.
    """
    table = table.loc[table["comparison"] == PAIR]
    if table.empty:
        return nothing("No question has a usable trace of both models, so no head is compared.")
    traces = [str(name) for name in dict.fromkeys(table["traces"])]
    layers, heads = int(table["layer"].max()) + 1, int(table["head"].max()) + 1
    size = len(traces) * max(2.2, 0.24 * heads) + 1.2, max(2.6, 0.22 * layers + 1.0)
    figure = Picture(_HEADS.format(keys=looked_at), figsize=size)
    grid = figure.subplots(1, len(traces), squeeze=False, sharey=True)[0]
    reach = float(np.nanmax(np.abs(table["difference"].to_numpy()), initial=1e-12))
    norm = Normalize(-reach, reach)
    for axes, name in zip(grid, traces, strict=True):
        some = table.loc[table["traces"] == name]
        value, p = (
            some.pivot(index="layer", columns="head", values=column).to_numpy()
            for column in ("difference", "p_corrected")
        )
        draw_heads(axes, value, p < ALPHA, norm, DIFFERENCE)
        axes.set_title(f"{TITLES.get(name, name)}  (n = {int(some['n'].max())})", fontsize=8)
    grid[0].set_ylabel(LAYER, fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm, DIFFERENCE), ax=list(grid), shrink=0.9)
    bar.set_label(f"{PAIR}, {table['measure'].iloc[0]}", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _band(axes: Axes, own: pd.DataFrame, side: str, label: str) -> None:
    colour = _COLOURS[side]
    low, high = own[f"{side}_low"], own[f"{side}_high"]
    axes.fill_between(own["layer"], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(own["layer"], own[side], color=colour, marker="o", markersize=3, label=label)


def _differences(axes: Axes, some: pd.DataFrame, own: pd.DataFrame) -> None:
    axes.axhline(0, color=PALE, linewidth=0.8)
    nulls = [name for name in dict.fromkeys(some["comparison"]) if name != PAIR]
    for i, name in enumerate(nulls):
        null = some.loc[some["comparison"] == name].sort_values("layer")
        _bars(axes, null, 0.14 * (i + 1), _MARKS[i % 3], NULLS[i % 3], f"learnt nothing: {name}")
    sure = own["p_corrected"] < ALPHA
    _bars(axes, own.loc[sure], 0.0, "o", INK, f"{PAIR}, p < {ALPHA} after correction")
    _bars(axes, own.loc[~sure], 0.0, "o", INK, f"{PAIR}, else", face="white")


def _bars(
    axes: Axes, table: pd.DataFrame, shift: float, mark: str, colour: str, label: str, face: str | None = None
) -> None:
    reach = np.stack([table["difference"] - table["low"], table["high"] - table["difference"]])
    axes.errorbar(
        table["layer"] + shift, table["difference"], yerr=np.nan_to_num(np.abs(reach)), fmt=mark, color=colour,
        markerfacecolor=face or colour, markersize=4, linewidth=1, label=label,
    )  # fmt: skip
