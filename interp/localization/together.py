"""Swaps and ablations taken together: one table of all ways of swapping, one dataset of all that was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import xarray as xr

from interp.localization.outcomes import layer_contributions, outcome_shares
from interp.localization.plots import CONTRIBUTION
from interp.localization.swap import Swap

COUNTERFACTUAL = "counterfactual"
"""The pairs that are asked about; all others are controls."""


def swap_table(
    results: Mapping[str, xr.Dataset],
    swaps: Mapping[str, Sequence[Swap]],
    among: str = "differing",
) -> pd.DataFrame:
    """The outcomes of every way of swapping and kind of pairs; of suffixes also CR(k) − CR(k+1), layer by layer.

    Args:
        results: kind of pairs (`COUNTERFACTUAL`, or the name of a control) to what `vision_swap` returns.
        swaps: way of swapping ("single", "suffix", "window:3", ...) to its swaps.
        among: as in `outcome_shares`, for the pairs asked about; controls are always counted whole.

    Returns:
        Columns mode, pairs, and those of `outcome_shares`; of layer contributions the outcome is `CONTRIBUTION`.
    """
    tables = []
    for mode, some in swaps.items():
        names = [swap.name for swap in some]
        for kind, found in results.items():
            own, counted = found.sel(swap=names), among if kind == COUNTERFACTUAL else "all"
            tables.append(outcome_shares(own, counted).assign(mode=mode, pairs=kind))
            if mode == "suffix" and kind == COUNTERFACTUAL:
                parts = layer_contributions(own, counted).rename(columns={"layer": "first"})
                parts = parts.assign(mode=mode, pairs=kind, outcome=CONTRIBUTION, last=parts["first"])
                swapped = [some[k] for k in parts["first"]]
                tables.append(parts.assign(swap=[s.name for s in swapped], what=[s.what for s in swapped]))
    table = pd.concat(tables, ignore_index=True)
    front = ["mode", "pairs", "function", "first", "last", "outcome", "value", "low", "high", "n", "left_out"]
    return table.loc[:, [*front, *(name for name in table if name not in front)]]


def in_one(found: Sequence[xr.Dataset]) -> xr.Dataset:
    """What `vision_swap` and `ablate` return in one dataset; what both have is named apart.

    Of an ablation, example becomes question, clean clean_right, cluster cluster_question, why why_question and fault
    fault_ablation.
    """
    apart = {"example": "question", "clean": "clean_right", "cluster": "cluster_question"}
    apart |= {"why": "why_question", "fault": "fault_ablation"}
    renamed = [
        one.rename({old: new for old, new in apart.items() if old in one.variables})
        if "ablation" in one.dims
        else one
        for one in found
    ]
    merged = xr.merge(renamed, combine_attrs="drop_conflicts", join="outer", compat="no_conflicts")
    assert isinstance(merged, xr.Dataset)
    return merged
