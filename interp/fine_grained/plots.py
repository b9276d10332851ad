"""The fine-grained metrics as a figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from interp.fine_grained.questions import METRICS
from interp.results.palette import CONTROL, of_model
from interp.results.picture import Picture, nothing

_CAPTION = (
    "Share of questions that a model meets each metric on, with Wilson's 95 % interval; one colour a model. Grey bar: "
    "the control of the same model on the same questions, for M_vis the share right with a black image and wrong with "
    "the true one, for M_v2r the share right with both images and no description; M_rea has none."
)


def plot_metrics(table: pd.DataFrame, models: Sequence[str]) -> Picture:
    """Every metric of every model with its interval; grey: its control. A sentence where no metric has a value.

    Args:
        table: `fine_grained_table` of every model, with a column `model`.
        models: in the order of the legend.
    """
    if table.empty or not table["measure"].isin(METRICS).any():
        return nothing("No metric has a question that it can be measured on.")
    whole = table.loc[table["task"] == "all"] if (table["task"] == "all").any() else table
    names = [name for name in METRICS if name in set(whole["measure"])]
    figure = Picture(_CAPTION, figsize=(1.9 + 1.7 * len(names), 2.8))
    axis = figure.subplots()
    for k, model in enumerate(models):
        some = (
            whole.loc[whole["model"] == model].drop_duplicates("measure").set_index("measure").reindex(names)
        )
        x = np.arange(len(names)) + 0.22 * (k - (len(models) - 1) / 2)
        value, low, high = (some[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
        ends, colour = [value - low, high - value], of_model(model)
        axis.errorbar(x, value, ends, fmt="o", capsize=2, color=colour, label=model.upper())
        axis.plot(x, some["control"].to_numpy(dtype=float), "_", color=CONTROL, ms=12, mew=2)
    axis.plot([], [], "_", color=CONTROL, ms=12, mew=2, label="control")
    axis.set_xticks(range(len(names)), [f"$M_{{{name}}}$" for name in names])
    axis.set_ylabel("share of questions")
    axis.set_ylim(-0.03, 1.03)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
