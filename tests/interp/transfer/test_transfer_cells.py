"""What a figure of the transfer shows, and what was left out of its table."""

import numpy as np
import pandas as pd
import xarray as xr

from experiments.commands.transfer import finding
from interp.transfer import POOLED, shown_cells, unmeasured


def test_all_questions_are_shown_with_means_of_groups_or_the_first_tasks() -> None:
    tasks = [f"t{i}" for i in range(6)]
    single = pd.DataFrame({"metric": "accuracy", "task": [*tasks, POOLED, *tasks, POOLED]})
    assert shown_cells(single) == [("accuracy", task) for task in (POOLED, *tasks[:3])]
    grouped = pd.concat([single, pd.DataFrame({"metric": ["accuracy"], "task": ["reasoning, mean"]})])
    assert shown_cells(grouped) == [("accuracy", POOLED), ("accuracy", "reasoning, mean")]
    alone = pd.DataFrame({"metric": "accuracy", "task": ["mine", "mine"]})
    assert shown_cells(alone) == [("accuracy", "mine")]


def test_tasks_that_a_figure_has_no_room_for_are_named() -> None:
    tasks = [*(f"t{i}" for i in range(5)), POOLED]
    rows = [
        dict(metric="accuracy", task=task, variant=variant, kind=kind, n=4, p_adjusted=np.nan)
        | dict(change=0.1, change_low=0.0, change_high=0.2, refused=False, lacking="")
        for task in tasks
        for variant, kind in (("RL", "model"), ("I:R:R", "order"))
    ]
    table = pd.DataFrame(rows)
    told = " ".join(finding(table, shown_cells(table)))
    assert told.startswith("all questions: RL − IN = ") and "(n = 4)" in told
    assert told.endswith("In the table alone: accuracy t3, accuracy t4.")


def test_an_example_is_counted_once_however_many_variants_lack_it() -> None:
    right = np.array([[1.0, np.nan, np.nan, 0.0], [np.nan, np.nan, np.nan, 1.0]])
    why = np.array([["", "no image", "no key", "no answer"], ["no key", "no image", "other", ""]])
    found = xr.Dataset({"right": (("variant", "example"), right), "why": (("variant", "example"), why)})
    found = found.assign_coords(refused=("variant", [False, False]))
    assert unmeasured(found) == {"no key": 2, "no image": 1, "other": 1}
