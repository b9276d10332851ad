"""A comparison's tensors summed up: per layer, per region, in all.

The norm of a group is the root of the sum of squares: of its update as one vector. The released code of 2602.12395
averages the norms of matrices of different shapes and adds norms linearly; both are here by name (`mean_norm`,
`sum_norm`), beside it (`fro_norm`). The size of its Fig. 5 is that of the mean of relative norms
(`mean_relative_norm`); its code takes for a matrix whatever is named weight and not norm, and so counts the
projector's `ln_q` among them (`released_relative_norm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hooks.errors import FrankenlensError
from interp.comparison.table import chance
from interp.regions import Partition
from interp.statistics import mean_interval

NORMS = ("fro_norm", "mean_norm", "sum_norm", "mean_relative_norm", "released_relative_norm")
"""Root of the sum of squares; mean and linear sum over matrices; mean over matrices of each one's relative norm, which
is what the paper's Fig. 5 shows; the same over what its released code counts."""
RELATIVE = ("mean_relative_norm", "released_relative_norm")
"""Those that are shares of W_IN's norm."""
TRENDS = (10, 20, 30, 40)
"""Ranks whose log(σ_i / σ_1) the paper follows over the layers."""
_MEANS = {
    "relative_norm": "mean_relative_norm",
    "stable_rank": "stable_rank",
    "stable_rank_random": "stable_rank_random",
    "effective_rank": "effective_rank",
    "effective_rank_random": "effective_rank_random",
    "energy_outside": "energy_outside",
    "energy_outside_chance": "energy_outside_chance",
    "principal_angle_mean_left": "principal_angle_mean_left",
    "principal_angle_mean_right": "principal_angle_mean_right",
}
"""Columns of matrices whose mean over the matrices of a group is given, and what it is called."""


def aggregate(table: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """One row per group and stage.

    Columns: n_tensors, n_matrices (two axes or more), n (entries); fro_norm and reference_norm, roots of the sums of
    squares, and relative_norm, their ratio; rounding_norm; mean_norm and sum_norm (`NORMS`), mean_relative_norm
    (over matrices) and released_relative_norm (over what the released code counts, where names are known); mean_abs,
    max_abs, sparsity (in sparsity_type), sparsity_random and cosine of all entries together; means over matrices of
    ranks, angles and energy outside, where there are any; energy_share, the group's share of the stage's sum of
    squares, beside entries_share, which it would have if every entry had changed alike.

    Args:
        table: what `compare` returns.
        by: its columns (or others that were added) that make the groups; none makes one group.

    Raises:
        FrankenlensError: no such column.
    """
    unknown = [name for name in by if name not in table]
    if unknown:
        raise FrankenlensError(
            f"the comparison has no column {unknown[0]!r} to group by, only {', '.join(table)}"
        )
    keys = [*by, "stage"]
    rows = []
    for values, group in table.groupby(keys, sort=False, dropna=False):
        rows.append(_labels(keys, values) | _sums(group))
    found = pd.DataFrame(rows).astype({name: table.dtypes[name] for name in keys})
    found["cosine"] = cosines(found, by)
    squares, entries = found["fro_norm"] ** 2, found["n"]
    total = [one.groupby(found["stage"]).transform("sum") for one in (squares, entries)]
    found["energy_share"] = (squares / total[0]).where(total[0] > 0)
    found["entries_share"] = entries / total[1]
    return found


def cosines(found: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """scalar_product / product of the norms of both stages, of each group of rows; NaN without a second stage."""
    everything = pd.Series(0, index=found.index)
    groups = found["fro_norm"].groupby([found[name] for name in by] or everything, dropna=False)
    size = groups.transform("prod").where(groups.transform("size") == 2)
    return (found["scalar_product"] / size).where(size > 0)


def layers(table: pd.DataFrame) -> pd.DataFrame:
    """One row per layer and stage, along the unified index; `layer` is an address, its norms included.

    What is in no block has a row of its own: projector (index 0), embed, ln_final, unembed, `vision (rest)`, what of
    the tower is in none of its blocks, and rest.
    """
    blocks = table["address"].str.extract(r"^((?:\w+\.)?blocks\.\d+)", expand=False)
    named = table.assign(layer=blocks.fillna(table["address"].replace("vision", "vision (rest)")))
    found = aggregate(named, ["layer", "section", "unified_index"])
    return found.sort_values(["stage", "unified_index"], kind="stable", ignore_index=True)


def with_regions(table: pd.DataFrame, partition: Partition) -> pd.DataFrame:
    """The table with a column `region`: the decoder's regions, and the section for all that is outside the decoder.

    Raises:
        FrankenlensError: the partition covers another number of layers.
    """
    decoder = table["section"] == "decoder"
    partition.require(int(table.loc[decoder, "layer_index"].max()) + 1)
    spans = [(name, range(first, last + 1)) for name, (first, last) in partition.regions.items()]
    names = {layer: name for name, span in spans for layer in span}
    return table.assign(region=table["section"].where(~decoder, table["layer_index"].map(names)))


def regions(table: pd.DataFrame, partition: Partition) -> pd.DataFrame:
    """One row per region and stage; sections outside the decoder are regions of their own."""
    return aggregate(with_regions(table, partition), ["region"])


def trends(long: pd.DataFrame, by: Sequence[str], ranks: Sequence[int] = TRENDS) -> pd.DataFrame:
    """log(σ_i / σ_1) at some ranks: mean over the matrices of a group, with its interval over matrices.

    Beside it, `random`: the mean of Gaussian matrices of the same shapes. Matrices without that many singular values,
    and values that are not trusted, are left out; n counts what remains.

    Args:
        long: what `interp.comparison.spectra` returns.
        by: columns that make the groups, beside stage and rank.
        ranks: from 1.
    """
    keys, rows = [*by, "stage"], []
    for values, group in long[long["rank"].isin(ranks)].groupby(keys, sort=False, dropna=False):
        wide = [
            group.pivot(index="rank", columns="param_name", values=name)
            for name in ("log_ratio", "log_ratio_random")
        ]
        found = mean_interval(wide[0].to_numpy(float))
        numbers = pd.DataFrame({"rank": wide[0].index, "log_ratio": found.value, "low": found.low})
        numbers = numbers.assign(high=found.high, n=found.n, random=wide[1].mean(axis=1).to_numpy())
        rows.append(numbers.assign(**_labels(keys, values)))
    columns = [*keys, "rank", "log_ratio", "low", "high", "n", "random"]
    return (
        pd.concat(rows, ignore_index=True).reindex(columns=columns) if rows else pd.DataFrame(columns=columns)
    )


def _labels(keys: Sequence[str], values: Any) -> dict[str, Any]:
    return dict(zip(keys, values, strict=True))


def _sums(group: pd.DataFrame) -> dict[str, Any]:
    matrices = group[group["columns"].notna()] if "columns" in group else group
    n = int(group["n"].sum())
    norm, reference = (_root(group[name]) for name in ("fro_norm", "reference_norm"))
    found = {
        "n_tensors": len(group),
        "n_matrices": len(matrices),
        "n": n,
        "fro_norm": norm,
        "reference_norm": reference,
        "relative_norm": norm / reference if reference else np.nan,
        "rounding_norm": _root(group["rounding_norm"]),
        "mean_norm": matrices["fro_norm"].mean(),
        "sum_norm": matrices["fro_norm"].sum(),
        "mean_abs": (group["mean_abs"] * group["n"]).sum() / n,
        "max_abs": group["max_abs"].max(),
        "sparsity": (group["sparsity"] * group["n"]).sum() / n,
        "sparsity_random": (group["sparsity_random"] * group["n"]).sum() / n,
        "sparsity_type": types_of(group),
        "scalar_product": group["scalar_product"].sum(min_count=1),
        "cosine": np.nan,
        "cosine_chance": chance(n),
    }
    if {"param_name", "unified_index"} <= set(group):
        names = group["param_name"]
        counted = names.str.contains("weight") & ~names.str.lower().str.contains("norm")
        counted &= group["unified_index"].notna()
        found["released_relative_norm"] = group.loc[counted, "relative_norm"].mean()
    return found | {to: matrices[name].mean() for name, to in _MEANS.items() if name in matrices}


def types_of(rows: pd.DataFrame) -> str:
    """The types in which rows' values were counted as unchanged, e.g. `bfloat16`."""
    return ", ".join(sorted({one for some in rows["sparsity_type"] for one in some.split(", ")}))


def _root(norms: pd.Series) -> float:
    return float(np.sqrt((norms**2).sum()))
