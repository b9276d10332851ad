"""The table of a transfer: accuracy, difference to IN, exact tests corrected for being many, and recovery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from interp.questions.examples import clusters_of
from interp.statistics import adjust, change_interval, interval_text, mcnemar, ratio_interval, share_interval

POOLED = "all questions"
"""The task of the rows in which all questions of a metric are taken together."""
ACCURACY = "accuracy"
"""The metric that every other one has beside it: the share of its own questions that are right as they are asked."""
PANELS = 4  # of a figure


def transfer_table(
    found: xr.Dataset,
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    correction: str = "holm",
    **settings,
) -> pd.DataFrame:
    """One row per metric, task and variant; where there are several tasks, also one for all questions together.

    Recovery is (m - IN) / (RL - IN), the ratio of sums over examples. It is refused, and `recovery_why` says so, where
    the interval of RL - IN includes 0 or there is none.

    Args:
        found: what `interp.transfer.transfer` returns.
        groups: name to tasks whose examples are taken together, e.g. {"reasoning": REASONING}; a group of which a
            metric has no examples is left out.
        correction: "holm" or "bh", over the variants that are neither models nor controls, for each metric and task.
        settings: as in `interp.statistics.change_interval`: confidence.

    Returns:
        Columns: metric, task, variant, kind, control_of; value, low, high (the metric, Wilson); accuracy (of the same
        questions as they are asked, with their image where they have one; NaN where it was not measured); change,
        change_low, change_high (against IN, paired); gained, lost, p (McNemar, exact), p_adjusted; recovery,
        recovery_low, recovery_high, recovery_why; of a control: excess, excess_low, excess_high (its variant minus the
        control, paired); unread (share whose answer cannot be read), n, left_out; norm_ratio, cosine and
        held (of the update that the weights hold to the one asked for, and the share of entries in tensors that hold
        their part; NaN for models), refused (whether the variant was not run) and lacking (what the weights lack).
    """
    tables = []
    for metric, task, places in _cells(found, groups or {}):
        rows = [_row(found, k, places, settings) for k in range(found.sizes["variant"])]
        table = pd.DataFrame(rows)
        if metric != ACCURACY:
            table["accuracy"] = _accuracies(found, metric, places)
        table.insert(0, "metric", metric)
        table.insert(1, "task", task)
        family = ~table["kind"].isin(["model", "control"])
        p = table["p"].where(family).to_numpy(np.float64)
        table.insert(list(table).index("p") + 1, "p_adjusted", adjust(p, correction))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def as_table_2(table: pd.DataFrame) -> pd.DataFrame:
    """Every metric in %, in the shape of the paper's Table 2: a row per metric and task, IN and RL around the mixtures.

    Accuracy of the questions of a metric has rows of its own, named after the metric.
    """
    chosen = table.loc[table["kind"].isin(["model", "order"])]
    names = [name for name in dict.fromkeys(chosen["variant"]) if name != "RL"] + ["RL"]
    wide = chosen.pivot(index=["metric", "task"], columns="variant", values="value")[names] * 100
    rows = list(dict.fromkeys(zip(chosen["metric"], chosen["task"], strict=True)))
    return wide.loc[rows].reset_index().rename_axis(columns=None)


def shown_cells(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (metric, task) that a figure has room for: all questions, then means of groups, or the first tasks.

    Where other metrics than accuracy are measured, these.
    """
    own = table.loc[table["metric"] != ACCURACY] if (table["metric"] != ACCURACY).any() else table
    cells = list(dict.fromkeys(zip(own["metric"], own["task"], strict=True)))
    pooled = [cell for cell in cells if cell[1] == POOLED]
    groups = [cell for cell in cells if cell[1].endswith(", mean")]
    tasks = [cell for cell in cells if cell not in pooled + groups]
    return (pooled + (groups or tasks))[:PANELS]


def unmeasured(found: xr.Dataset) -> dict[str, int]:
    """Reason to number of examples for which some variant that ran has no value; of what `transfer` returns."""
    found = found.isel(variant=~found["refused"].to_numpy())
    missing, why = found["right"].isnull().to_numpy(), found["why"].to_numpy()
    rows, places = missing.nonzero()
    once = {(int(place), str(why[row, place])) for row, place in zip(rows, places, strict=True)}
    return dict(Counter(reason for _, reason in sorted(once)))


def _cells(
    found: xr.Dataset, groups: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, Int[np.ndarray, " place"]]]:
    metrics, tasks = found["metric"].to_numpy(), found["task"].to_numpy()
    for metric in dict.fromkeys(metrics.tolist()):
        own = metrics == metric
        for task in dict.fromkeys(tasks[own].tolist()):
            yield metric, task, np.flatnonzero(own & (tasks == task))
        for group, members in groups.items():
            places = np.flatnonzero(own & np.isin(tasks, list(members)))
            if len(set(tasks[places].tolist())) > 1:
                yield metric, f"{group}, mean", places
        if len(set(tasks[own].tolist())) > 1:
            yield metric, POOLED, np.flatnonzero(own)


def _accuracies(
    found: xr.Dataset, metric: str, places: Int[np.ndarray, " place"]
) -> Float[np.ndarray, " variant"]:
    """Each variant's accuracy on the questions of another metric; NaN where it was not measured."""
    of = found.isel(example=found["metric"].to_numpy() == ACCURACY)
    ids = {f"{metric}: {one}" for one in found["id"].to_numpy()[places]}
    right = of["right"].to_numpy()[:, [one in ids for one in of["id"].to_numpy()]]
    there = ~np.isnan(right)
    return np.where(there.any(1), np.nansum(right, 1) / np.maximum(there.sum(1), 1), np.nan)


def _row(
    found: xr.Dataset, k: int, places: Int[np.ndarray, " place"], settings: Mapping
) -> dict[str, object]:
    right = found["right"].to_numpy()[:, places]
    names = found["variant"].to_numpy().tolist()
    own, in_, rl = right[k], right[names.index("IN")], right[names.index("RL")]
    there = own[~np.isnan(own)]
    known = clusters_of(found)
    of = None if known is None else known[places]
    share = share_interval(own, of)
    change = change_interval(own, in_, of, **settings)
    test = mcnemar(own, in_, of)
    why = found["why"].to_numpy()[k, places]
    control_of = str(found["control_of"].to_numpy()[k])
    beside = right[names.index(control_of)] if control_of else np.full_like(own, np.nan)
    excess = change_interval(beside, own, of, **settings)
    is_in, refused = names[k] == "IN", bool(found["refused"].to_numpy()[k])
    return {
        "variant": names[k],
        "kind": str(found["kind"].to_numpy()[k]),
        "control_of": control_of,
        "value": float(share.value),
        "accuracy": float(share.value),
        "low": float(share.low),
        "high": float(share.high),
        "change": float(change.value),
        "change_low": float(change.low),
        "change_high": float(change.high),
        "gained": test.gained,
        "lost": test.lost,
        "p": np.nan if is_in or refused else test.p,
        **_recovery(own, in_, rl, {**settings, "clusters": of}),
        "excess": float(excess.value),
        "excess_low": float(excess.low),
        "excess_high": float(excess.high),
        "unread": float(np.mean(why[~np.isnan(own)] != "")) if len(there) else np.nan,
        "n": len(there),
        "left_out": int(np.isnan(own).sum()),
        "norm_ratio": float(found["norm_ratio"].to_numpy()[k]),
        "cosine": float(found["cosine"].to_numpy()[k]),
        "held": float(found["held"].to_numpy()[k]),
        "refused": refused,
        "lacking": str(found["lacking"].to_numpy()[k]),
    }


def _recovery(
    own: Float[np.ndarray, " example"],
    in_: Float[np.ndarray, " example"],
    rl: Float[np.ndarray, " example"],
    settings: Mapping,
) -> Mapping[str, object]:
    if np.isnan(own).all():
        return dict.fromkeys(("recovery", "recovery_low", "recovery_high"), np.nan) | {"recovery_why": ""}
    gap = change_interval(rl, in_, **settings)
    if not (float(gap.low) > 0 or float(gap.high) < 0):
        reason = f"RL − IN = {interval_text(gap.value, gap.low, gap.high)} is not told from 0"
        return dict.fromkeys(("recovery", "recovery_low", "recovery_high"), np.nan) | {"recovery_why": reason}
    ratio = ratio_interval(own - in_, rl - in_, **settings)
    return {
        "recovery": float(ratio.value),
        "recovery_low": float(ratio.low),
        "recovery_high": float(ratio.high),
        "recovery_why": "",
    }
