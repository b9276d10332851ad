"""The fine-grained metrics as a figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from interp.fine_grained.questions import METRICS


def plot_metrics(table: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Every metric of every model with its interval; grey: its control.

    Args:
        table: `fine_grained_table` of every model, with a column `model`.
        models: in the order of the legend.
    """
    whole = table.loc[table["task"] == "all"] if (table["task"] == "all").any() else table
    names = [name for name in METRICS if name in set(whole["measure"])]
    figure = Figure(figsize=(1.6 + 1.7 * len(names), 2.8), layout="constrained")
    axis = figure.subplots()
    for k, model in enumerate(models):
        some = whole.loc[whole["model"] == model].set_index("measure").loc[names]
        x = np.arange(len(names)) + 0.22 * (k - (len(models) - 1) / 2)
        value, low, high = (some[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
        axis.errorbar(x, value, [value - low, high - value], fmt="o", capsize=2, label=model.upper())
        axis.plot(x, some["control"].to_numpy(dtype=float), "_", color="grey", ms=12, mew=2)
    axis.plot([], [], "_", color="grey", ms=12, mew=2, label="control")
    axis.set_xticks(range(len(names)), [f"$M_{{{name}}}$" for name in names])
    axis.set_ylabel("share of questions")
    axis.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
