"""What a figure of the transfer shows, and what was left out of its table."""

import numpy as np
import pandas as pd
import xarray as xr

from interp.transfer import shown_cells, unmeasured


def test_means_of_groups_are_shown_and_else_the_first_four() -> None:
    tasks = [f"t{i}" for i in range(6)]
    single = pd.DataFrame({"metric": "accuracy", "task": [*tasks, *tasks]})
    assert shown_cells(single) == [("accuracy", task) for task in tasks[:4]]
    grouped = pd.concat([single, pd.DataFrame({"metric": ["accuracy"], "task": ["reasoning, mean"]})])
    assert shown_cells(grouped) == [("accuracy", "reasoning, mean")]


def test_an_example_is_counted_once_however_many_variants_lack_it() -> None:
    right = np.array([[1.0, np.nan, np.nan, 0.0], [np.nan, np.nan, np.nan, 1.0]])
    why = np.array([["", "no image", "no key", "no answer"], ["no key", "no image", "other", ""]])
    found = xr.Dataset({"right": (("variant", "example"), right), "why": (("variant", "example"), why)})
    assert unmeasured(found) == {"no key": 2, "no image": 1, "other": 1}
