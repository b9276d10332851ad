"""What swaps and ablations found, in a sentence per function with n, interval and control."""

from __future__ import annotations

import pandas as pd

from interp.localization.plots import ALPHA
from interp.regions import Partition
from interp.statistics import interval_text


def _region(layer: int, partition: Partition) -> str:
    return next(name for name, (first, last) in partition.regions.items() if first <= layer <= last)


def headline(swaps: pd.DataFrame | None, ablations: pd.DataFrame | None, partition: Partition) -> list[str]:
    """The outcome in at most three sentences: the layers that swaps and ablations name, and the control of the swap.

    Args:
        swaps: as in `swap_findings`.
        ablations: as in `ablation_findings`.
        partition: in which region a layer lies.
    """
    sentences = []
    if swaps is not None:
        mode = _mode(swaps)
        told = [_swap_peak(function, some, partition) for function, some in _by_function(swaps, mode)]
        if some := "; ".join(one for one in told if one):
            sentences.append(f"By {mode} swaps most pairs take the source's answer at: {some}.")
        sentences += _itself(swaps)
    if ablations is not None:
        chosen = ablations.loc[(ablations["function"] != "all") & ablations["change"].notna()]
        told = [_worst(str(f), some, partition) for f, some in chosen.groupby("function", sort=False)]
        if some := "; ".join(one for one in told if one):
            sure = int(((chosen["p_corrected"] < ALPHA) & (chosen["change"] < 0)).sum())
            sentences.append(
                f"Without one component accuracy falls most: {some}; {sure} of {len(chosen)} ablations lose after "
                "correction."
            )
    return sentences


def _mode(table: pd.DataFrame) -> str:
    return "single" if "single" in set(table["mode"]) else str(table["mode"].iloc[0])


def _by_function(table: pd.DataFrame, mode: str) -> list[tuple[str, pd.DataFrame]]:
    chosen = table.loc[(table["mode"] == mode) & (table["function"] != "all")]
    return [(str(function), some) for function, some in chosen.groupby("function", sort=False)]


def _swap_peak(function: str, some: pd.DataFrame, partition: Partition) -> str:
    own = some.loc[(some["pairs"] == "counterfactual") & (some["outcome"] == "source")]
    if not own["value"].notna().any():
        return ""
    best = own.loc[own["value"].idxmax()]
    layer = int(best["first"])
    text = (
        f"{function} layer {layer} ({_region(layer, partition)}), "
        f"{interval_text(best['value'], best['low'], best['high'])} of n = {best['n']}"
    )
    control = some.loc[(some["pairs"] == "same answer") & (some["outcome"] == "changed")]
    for _, row in control.loc[control["first"] == layer].iterrows():
        text += (
            f" (source with the same answer: {interval_text(row['value'], row['low'], row['high'])} change)"
        )
    return text


def _worst(function: str, some: pd.DataFrame, partition: Partition) -> str:
    worst = some.loc[some["change"].idxmin()]
    if not worst["change"] < 0:
        return ""
    change = interval_text(worst["change"], worst["change_low"], worst["change_high"])
    region = _region(int(worst["layer"]), partition)
    return f"{function} {worst['ablation']} ({region}) {change} (n = {worst['n']}, whole {100 * worst['whole']:.0f} %)"


def _itself(table: pd.DataFrame) -> list[str]:
    itself = table.loc[
        (table["pairs"] == "itself") & (table["outcome"] == "changed") & (table["function"] != "all")
    ]
    if itself.empty:
        return []
    n = sum(int(some["n"].max()) for _, some in itself.groupby("function"))
    rate = float(itself["value"].max())
    return [f"An image swapped with itself changes a share of {rate:.3g} of the answers (n = {n})."]


def swap_findings(table: pd.DataFrame | None, partition: Partition) -> list[str]:
    """Per function the swap after which the source's answer is taken most often, beside the controls; or none.

    Args:
        table: as `interp.localization.plots.plot_swaps` takes it.
        partition: in which region the layer lies.
    """
    if table is None:
        return []
    sentences = []
    mode = _mode(table)
    for function, some in _by_function(table, mode):
        own = some.loc[(some["pairs"] == "counterfactual") & (some["outcome"] == "source")]
        if not own["value"].notna().any():
            sentences.append(f"{function}: no pair on which the model answers the two images differently.")
            continue
        best = own.loc[own["value"].idxmax()]
        text = (
            f"{function}, {mode} swaps: the source's answer is taken most often at layer {best['first']} "
            f"({_region(int(best['first']), partition)}), {interval_text(best['value'], best['low'], best['high'])} "
            f"of n = {best['n']}"
        )
        control = some.loc[(some["pairs"] == "same answer") & (some["outcome"] == "changed")]
        for _, row in control.loc[control["first"] == best["first"]].iterrows():
            text += f"; source with the same answer: {interval_text(row['value'], row['low'], row['high'])} change"
        sentences.append(text + ".")
    return sentences


def ablation_findings(table: pd.DataFrame | None, partition: Partition) -> list[str]:
    """Per function the component whose loss costs most; none without ablations.

    Args:
        table: what `interp.localization.accuracy` returns.
        partition: in which region the layer lies.
    """
    if table is None:
        return []
    sentences = []
    for function, some in table.loc[table["function"] != "all"].groupby("function", sort=False):
        if not some["n"].max():
            sentences.append(f"{function}: no answer of the whole model can be read.")
            continue
        worst = some.loc[some["change"].idxmin()]
        sure = some.loc[(some["p_corrected"] < ALPHA) & (some["change"] < 0)]
        text = f"{function}: the whole model is right in {100 * worst['whole']:.0f} % (n = {worst['n']}); "
        if worst["change"] < 0:
            change = interval_text(worst["change"], worst["change_low"], worst["change_high"])
            region = _region(int(worst["layer"]), partition)
            text += f"{worst['ablation']} ({region}) costs most, {change}; "
        sentences.append(f"{text}{len(sure)} of {len(some)} ablations lose after correction.")
    return sentences
