"""The figure of `dose_table`: accuracy by coefficient, beside random directions of equal length."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from interp.results.palette import CONTROL, INK, MIXED, of_model
from interp.results.picture import Picture, nothing

_CAPTION = (
    "Accuracy of a model with RL − IN's direction added to a component, by the coefficient, with Wilson's 95 % "
    "intervals; a row a model, a panel a direction. Grey: each random direction of equal length. Dashed, in the "
    "model's colour: the model as it is, which is also the point at 0."
)


def plot_dose(table: pd.DataFrame, function: str) -> Picture:
    """Accuracy in %, with Wilson's 95 % intervals, against the coefficient; a row per model, a panel per direction.

    Grey: each random direction of that length. Dashed: the model as it is, which is also the point at 0.

    Args:
        table: what `interp.steering.dose_table` returns, with a column `model`.
        function: the task that is shown, "all" for all together.
    """
    own = table.loc[table["function"] == function]
    if own.empty:
        return nothing("No direction was added to any model.")
    models, groups = list(dict.fromkeys(own["model"])), list(dict.fromkeys(own["group"]))
    size = (0.9 + 2.7 * len(groups), 0.7 + 2.3 * len(models))
    figure = Picture(_CAPTION, figsize=size)
    grid = figure.subplots(len(models), len(groups), sharex="row", sharey="row", squeeze=False)
    for line, model in zip(grid, models, strict=True):
        for axes, group in zip(line, groups, strict=True):
            some = own.loc[(own["model"] == model) & (own["group"] == group)]
            clean = 100 * float(some["clean"].iloc[0])
            axes.axhline(clean, color=of_model(model), linestyle="--", linewidth=1.1, zorder=0)
            for draw, rows in some.groupby("draw"):
                rows = rows.sort_values("coefficient")
                chosen = int(draw) < 0  # type: ignore[call-overload]
                x, y = _with_zero(rows, "coefficient", 0.0), _with_zero(rows, "accuracy", clean / 100)
                order = np.argsort(x)
                style = {"color": MIXED if chosen else CONTROL, "linewidth": 1.6 if chosen else 0.8}
                axes.plot(x[order], 100 * y[order], zorder=3 if chosen else 1, **style)
                if chosen:
                    low, high = 100 * rows["low"], 100 * rows["high"]
                    axes.vlines(rows["coefficient"], low, high, color=MIXED, linewidth=1.2)
                    axes.plot(rows["coefficient"], 100 * rows["accuracy"], "o", color=MIXED, markersize=4)
            share = float(some.loc[some["draw"] < 0, "share"].iloc[0])
            title = f"{model} + {group}" + (
                f" ({100 * share:.0f} % of the difference)" if share == share else ""
            )
            axes.set_title(title, fontsize=8.5, loc="left")
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("accuracy, %", fontsize=8)
        for axes in line:
            axes.set_xlabel("coefficient", fontsize=8)
    handles = [
        Line2D([], [], color=MIXED, marker="o", markersize=4, label="RL − IN's direction"),
        Line2D([], [], color=CONTROL, linewidth=0.8, label="control: random, of equal length"),
        Line2D([], [], color=INK, linestyle="--", linewidth=0.9, label="the model as it is, in its colour"),
    ]
    figure.legend(handles=handles, loc="outside upper left", fontsize=7, frameon=False, ncols=3)
    return figure


def _with_zero(rows: pd.DataFrame, column: str, at_zero: float) -> np.ndarray:
    return np.array([at_zero, *rows[column]], dtype=float)
