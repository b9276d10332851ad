"""The figure of the planted pairs: what each method finds, by kind of change and by its size."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from interp.results.palette import CONTROL, EFFECT, INK, PALE, SERIES, SHARE
from interp.results.picture import Picture, nothing

SHOWN = dict(
    zip(
        (
            "graft RL → IN",
            "patch z RL → IN",
            "attribution RL → IN",
            "knockout",
            "compare",
            "skip",
            "patch RL → IN",
        ),
        zip(SERIES, ("-", "--", ":", "-", "--", "-", "-"), strict=True),
        strict=True,
    )
)
"""Methods whose curves are drawn: one of each family, with its colour and line."""
_CAPTION = (
    "What each method finds in pairs whose change is known. Left: how often a changed component outranks an unchanged "
    "one (AUROC; 0.5 is chance), by what was planted, n pairs in brackets. Middle: share of null pairs, where nothing "
    "was learnt, on which the method claims something, by its tests alone and with recoveries refused. Right: single "
    "changed components by the size of their effect, mean and standard error; grey: smaller than noise."
)
FEWEST = 5  # plants in a bin of the curve


def plot_found(found: pd.DataFrame, null: pd.DataFrame, alone: pd.DataFrame) -> Picture:
    """AUROC by method and kind, claims on null pairs beside it, and AUROC of single plants by their effect.

    Args:
        found, null, alone: `interp.planting.table.found_table`, `null_table`, `by_effect`.
    """
    if found.empty and null.empty:
        return nothing("No method was tried on any pair.")
    methods = list(dict.fromkeys([*found["method"], *null["method"]]))
    kinds, nulls = list(dict.fromkeys(found["kind"])), list(dict.fromkeys(null["kind"]))
    wide = 2.2 + 0.62 * (len(kinds) + 2 * len(nulls))
    figure = Picture(_CAPTION, figsize=(wide + 4.4, max(3.6, 0.3 * len(methods) + 1.7)))
    ratios = [max(1, len(kinds)), *[max(1, len(nulls))] * 2, 6]
    axes = figure.subplots(1, 4, width_ratios=ratios)
    reached = found.assign(auroc=found["auroc"].where(found["in_reach"] > 0))
    _grid(axes[0], reached, methods, kinds, "auroc", "AUROC by what was planted", EFFECT)
    _grid(axes[1], null, methods, nulls, "tested", "null pairs with\na claim, by tests alone", SHARE)
    _grid(axes[2], null, methods, nulls, "claimed", "… and with the\nrefusal of recoveries", SHARE)
    for one in axes[1:3]:
        one.set_yticklabels([])
    _curves(axes[3], alone)
    return figure


def _grid(
    axes: Axes,
    table: pd.DataFrame,
    methods: Sequence[str],
    columns: Sequence[str],
    value: str,
    title: str,
    colours: str,
) -> None:
    if not columns:
        _say(axes, "no such pair")
        return
    axes.set_title(title, fontsize=9)
    cells = (
        table.pivot(index="method", columns="kind", values=value)
        .reindex(methods)[list(columns)]
        .to_numpy(float)
    )
    norm, colour = Normalize(0, 1), matplotlib.colormaps[colours]
    axes.set_facecolor("0.93")
    axes.imshow(cells, cmap=colour, norm=norm, aspect="auto")
    for row, column in np.ndindex(*cells.shape):
        one = cells[row, column]
        dark = np.isfinite(one) and sum(colour(norm(one))[:3]) < 1.5
        axes.text(
            column,
            row,
            "–" if np.isnan(one) else f"{one:.2f}",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "black",
        )
    counts = table.groupby("kind")["n_pairs"].first()
    labels = [f"{name} ({counts[name]})" for name in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    axes.tick_params(length=0)


def _say(axes: Axes, why: str) -> None:
    """A panel with nothing to draw says so."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=8, wrap=True, transform=axes.transAxes)


def _curves(axes: Axes, alone: pd.DataFrame) -> None:
    """Mean of each bin of effects, with its standard error; what a method cannot reach is left out."""
    axes.set_title("changed components within reach, by effect", fontsize=9)
    some = alone.loc[(alone["times_noise"] > 0) & alone["in_reach"].astype(bool)]
    if some.empty:
        _say(axes, "no changed component has an effect that a method reaches")
        return
    ends = np.log10(some["times_noise"].quantile([0.005, 0.995]).to_numpy())
    edges = np.arange(np.floor(2 * ends[0]), np.ceil(2 * ends[1]) + 1) / 2
    place = np.digitize(np.log10(some["times_noise"]).clip(edges[0], edges[-1] - 1e-9), edges)
    for method, (colour, style) in SHOWN.items():
        own = some.loc[some["method"] == method]
        if own.empty:
            continue
        bins = own.groupby(place[(some["method"] == method).to_numpy()])["auroc"]
        table = bins.agg(["mean", "sem", "size"])
        table = table.loc[table["size"] >= FEWEST]
        middle = 10 ** (edges[table.index.to_numpy(int) - 1] + 0.25)
        axes.errorbar(
            middle, table["mean"], table["sem"], color=colour, linestyle=style, label=method, lw=1.4
        )
    axes.set_xscale("log")
    axes.set_xlim(10 ** edges[0], 10 ** edges[-1])
    axes.set_ylim(0, 1.03)
    if edges[0] < 0:
        axes.axvspan(10 ** edges[0], 1, color=PALE, alpha=0.35, zorder=0)
        axes.text(0.02, 0.02, "invisible", transform=axes.transAxes, fontsize=7.5, color=INK)
    axes.axhline(0.5, color=CONTROL, lw=0.6)
    axes.set_xlabel("effect / 95th percentile of noise pairs", fontsize=8)
    axes.set_ylabel("unchanged components outranked", fontsize=8)
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False, loc="lower right")
