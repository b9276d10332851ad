"""What training changed in the weights, in a sentence per stage with n, interval and control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from interp.comparison.aggregate import TRENDS, types_of
from interp.comparison.plots import STAGES
from interp.regions import Partition
from interp.statistics import interval_text


def headline(table: pd.DataFrame, by_region: pd.DataFrame, stage: str) -> str:
    """A stage's update in one sentence: its norm beside rounding, n, and the region that holds most for its size.

    Args:
        table: what `interp.comparison.compare` returns.
        by_region: what `interp.comparison.regions` returns.
        stage: of their rows.
    """
    some: Any = by_region.loc[by_region["stage"] == stage]
    total, size, rounding = (
        (some[name] ** 2).sum() ** 0.5 for name in ("fro_norm", "reference_norm", "rounding_norm")
    )
    n = int((table["stage"] == stage).sum())
    if not total:
        return f"{STAGES[stage]} is zero in all of n = {n} tensors."
    large = some.loc[some["energy_share"] >= 0.05]
    most = large.assign(times=large["energy_share"] / large["entries_share"]).nlargest(1, "times").iloc[0]
    return (
        f"{STAGES[stage]} is {total / size:.2g} of W_IN's norm (rounding to bfloat16 alone: {rounding / size:.2g}; "
        f"n = {n} tensors), and {most['region']} holds {100 * most['energy_share']:.0f} % of its energy with "
        f"{100 * most['entries_share']:.0f} % of the entries."
    )


def energy_finding(by_region: pd.DataFrame, stage: str) -> str:
    """The norm of a stage's update beside rounding, where its energy lies, and how many entries it left as they were.

    Args:
        by_region: what `interp.comparison.regions` returns.
        stage: of its rows.
    """
    some: Any = by_region.loc[by_region["stage"] == stage]
    total, size = ((some[name] ** 2).sum() ** 0.5 for name in ("fro_norm", "reference_norm"))
    rounding = (some["rounding_norm"] ** 2).sum() ** 0.5
    if not total:
        return f"{STAGES[stage]} is zero."
    shares = ", ".join(
        f"{row.region} {100 * row.energy_share:.1f} % (of entries {100 * row.entries_share:.1f} %)"
        for row in some.itertuples()
        if row.energy_share >= 0.0005
    )
    same, random = (
        (some[name] * some["n"]).sum() / some["n"].sum() for name in ("sparsity", "sparsity_random")
    )
    return (
        f"{STAGES[stage]} has norm {total:.3g}, {total / size:.2g} of W_IN's (rounding to bfloat16 alone: "
        f"{rounding / size:.2g}). Energy: {shares}. Unchanged in {types_of(some)}: {100 * same:.1f} % of the entries "
        f"(Gaussian update of that norm: {100 * random:.1f} %)."
    )


def relative_finding(by_region: pd.DataFrame, stage: str, norm: str) -> str:
    """The mean relative norm of a matrix's update in every region.

    Args:
        by_region: what `interp.comparison.regions` returns.
        stage: of its rows.
        norm: of `interp.comparison.aggregate.RELATIVE`.
    """
    some = by_region.loc[(by_region["stage"] == stage) & by_region[norm].notna()]
    told = ", ".join(
        f"{row['region']} {row[norm]:.2g} (n = {row['n_matrices']} matrices)"
        for row in some.to_dict("records")
    )
    return f"Mean relative norm of a matrix's update, {STAGES[stage]}: {told}."


def spectra_finding(found: pd.DataFrame, stage: str, partition: Partition) -> str:
    """How fast the singular values of a stage's update fall, per region, beside a Gaussian's.

    Args:
        found: what `interp.comparison.trends` returns per region.
        stage: of its rows.
        partition: the regions that are told.
    """
    rank = TRENDS[1]
    some = found[(found["stage"] == stage) & (found["rank"] == rank)]
    rows: Sequence[Any] = [row for row in some.itertuples() if row.region in partition.regions]
    if not rows:
        return f"{STAGES[stage]} has no matrix with {rank} singular values that differ from 0."
    texts = (
        f"{row.region} {interval_text(row.log_ratio, row.low, row.high)} "
        f"(n = {row.n} matrices; Gaussian {_signed(row.random)})"
        for row in rows
    )
    return f"log(σ_{rank} / σ_1) of {STAGES[stage]}: {', '.join(texts)}."


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
