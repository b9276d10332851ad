"""RL − IN of the fine-grained metrics, counted by hand; and their figure."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from interp.fine_grained import change_table, plot_metrics
from interp.statistics import change_interval, mcnemar

IN = np.array([1.0, 0, 0, 0, 1, 0, 0, 0, 0, np.nan, 1, 0])
RL = np.array([1.0, 1, 1, 1, 0, 0, 1, 1, 0, 1, np.nan, 1])


def test_the_change_is_paired_on_the_questions_that_both_have() -> None:
    value = np.stack([np.stack([IN, RL]), np.stack([RL, RL])])
    found = xr.Dataset(
        {"value": (("metric", "model", "example"), value)},
        coords={"metric": ["vis", "rea"], "model": ["in", "rl"]},
    )
    vis, rea = change_table(found).to_dict("records")
    assert (vis["measure"], vis["gained"], vis["lost"], vis["n"]) == ("vis", 6, 1, 10)
    expected = change_interval(RL, IN)
    assert (vis["change"], vis["low"], vis["high"]) == (expected.value, expected.low, expected.high)
    assert vis["change"] == pytest.approx(0.5) and vis["p"] == mcnemar(RL, IN).p
    assert (rea["change"], rea["gained"], rea["lost"], rea["n"], rea["p"]) == (0, 0, 0, 11, 1)


def test_the_figure_has_every_model_and_metric() -> None:
    rows = [
        {
            "model": model,
            "measure": measure,
            "task": task,
            "value": 0.5,
            "low": 0.4,
            "high": 0.6,
            "control": 0.1,
        }
        for model in ("in", "rl")
        for measure in ("vis", "rea", "accuracy, image")
        for task in ("sum", "all")
    ]
    figure = plot_metrics(pd.DataFrame(rows), ["in", "rl"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$M_{vis}$", "$M_{rea}$"]
    assert axes.get_legend_handles_labels()[1] == ["control", "IN", "RL"]
