"""Claims and what became of them: every quantity with its interval, its bound and its control."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from interp.results.palette import INK, MISSING, PALE, VERDICTS
from interp.results.picture import Picture, nothing

_CAPTION = (
    "Each claim on each pair: the quantity with its interval, in the colour of the verdict; black: the bound, with an "
    "arrow to the side that is claimed; diamond, grey: the control with its interval. Hollow: not told from the "
    "control. Beside it the verdict and n."
)
_AXIS = {
    "recovery": "recovery (share of the decision)",
    "effect": "effect (nats)",
    "accuracy": "change in accuracy (share of examples)",
}
_WIDTH = 44


def plot_claims(table: pd.DataFrame) -> Picture:
    """One row per claim and pair. The black bar is the bound, the arrow the side that the claim is on.

    Args:
        table: what `interp.hypotheses.verdict_table` returns, of one pair or several.
    """
    if table.empty:
        return nothing("There is no claim to judge.")
    quantities = list(dict.fromkeys(table["quantity"]))
    counts = [int((table["quantity"] == one).sum()) for one in quantities]
    height = 1.1 + 0.42 * sum(counts) + 0.75 * len(counts)
    figure = Picture(_CAPTION, figsize=(8.6, height))
    panels = figure.subplots(
        len(counts), 1, squeeze=False, gridspec_kw={"height_ratios": [n + 0.8 for n in counts]}
    )[:, 0]
    for axes, quantity in zip(panels, quantities, strict=True):
        _panel(axes, table.loc[table["quantity"] == quantity], quantity)
    figure.legend(handles=_legend(table), loc="outside upper left", fontsize=7, frameon=False, ncols=4)
    return figure


def _panel(axes: Axes, own: pd.DataFrame, quantity: str) -> None:
    several = own["pair"].nunique() > 1
    labels = []
    for place, row in enumerate(own.to_dict("records")):
        y, colour = -float(place), VERDICTS[row["verdict"]]
        labels.append(
            "\n".join(textwrap.wrap(row["claim"], _WIDTH)) + (f"\n{row['pair']}" if several else "")
        )
        axes.plot([row["control_low"], row["control_high"]], [y - 0.2] * 2, color=PALE, linewidth=1.2)
        axes.plot([row["control"]], [y - 0.2], "D", color=PALE, markersize=3)
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.6)
        face = "white" if row["control_says"] == "not told from control" else colour
        axes.plot([row["value"]], [y], "o", color=colour, markerfacecolor=face, markersize=5)
        axes.plot([row["bound"]] * 2, [y - 0.32, y + 0.32], color=INK, linewidth=1.3)
        axes.annotate(
            "",
            (row["bound"], y + 0.28),
            xytext=(10 if row["relation"] == ">=" else -10, 0),
            textcoords="offset points",
            arrowprops={"arrowstyle": "<-", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
        )
        said = f"{row['verdict']}, n = {row['n']}" if row["verdict"] != "refused" else "refused"
        said += "\nexploratory" if row["origin"] == "exploratory" else ""
        axes.text(1.01, y, said, transform=axes.get_yaxis_transform(), va="center", fontsize=7, color=colour)
    axes.axvline(0, color=MISSING, linewidth=0.8, zorder=0)
    axes.set_yticks([-float(i) for i in range(len(labels))], labels, fontsize=7.5)
    axes.set_ylim(-len(labels) + 0.45, 0.55)
    axes.set_xlabel(_AXIS[quantity], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(table: pd.DataFrame) -> list[Line2D]:
    def mark(label: str, **style) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **{"marker": "o", "markersize": 5, **style})

    found = [
        mark(name, color=colour) for name, colour in VERDICTS.items() if (table["verdict"] == name).any()
    ]
    if (table["control_says"] == "not told from control").any():
        found.append(mark("not told from its control", color=INK, markerfacecolor="white"))
    found.append(mark("control", color=PALE, marker="D", markersize=3))
    found.append(mark("bound, and the side claimed", color=INK, marker="|", markersize=9))
    return found
