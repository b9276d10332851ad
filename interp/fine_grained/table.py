"""The fine-grained metrics with intervals, n and controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Shaped

from interp.fine_grained.questions import APART, NEEDS
from interp.questions.examples import clusters_of
from interp.statistics import change_interval, mcnemar, share_interval


def fine_grained_table(found: xr.Dataset, confidence: float = 0.95) -> pd.DataFrame:
    """Every metric, and the accuracy of every variant, with Wilson's intervals, per task and over all.

    Columns: measure (vis, v2r, rea, or "accuracy, image" and so on), task ("all": together), value, low, high, n,
    left_out (examples that belong to the measure and could not be asked or graded), no_answer (of n, those with a
    reply in which no answer could be read; they count as wrong), control, control_low, control_high (see the module;
    NaN where there is none), p (McNemar, exact, of the measure against its control, not corrected). Measures to which
    no example belongs have no row.
    """
    tasks = found["task"].to_numpy()
    names = list(dict.fromkeys(tasks.tolist()))
    rows = []
    for task in [*names, *(["all"] if len(names) > 1 else [])]:
        some = found.isel(example=np.flatnonzero((tasks == task) | (task == "all")))
        for metric in some["metric"].to_numpy().tolist():
            rows.append({"measure": metric, "task": task} | _metric_row(some, metric, confidence))
        for variant in some["variant"].to_numpy().tolist():
            one = some.sel(variant=variant)
            values, why = one["right"].to_numpy(), one["why"].to_numpy()
            unread = _unread(some, (variant,))
            share = _share(values, why, unread, confidence, clusters_of(some))
            rows.append({"measure": f"accuracy, {variant}", "task": task} | share)
    return pd.DataFrame([row for row in rows if row["n"] or row["left_out"]])


def change_table(found: xr.Dataset) -> pd.DataFrame:
    """RL − IN of every metric on the questions that both have.

    Args:
        found: what `ask` returns of "in" and of "rl", along a dimension `model`.

    Returns:
        Columns measure, change, low, high (paired, 95 %), gained, lost, n, p (McNemar, exact, not corrected).
    """
    rows = []
    for metric in found["metric"].to_numpy().tolist():
        in_, rl = (found["value"].sel(model=name, metric=metric).to_numpy() for name in ("in", "rl"))
        of = clusters_of(found)
        test, change = mcnemar(rl, in_, of), change_interval(rl, in_, of)
        ends = {"change": change.value, "low": change.low, "high": change.high}
        counts = {"gained": test.gained, "lost": test.lost, "n": test.n, "p": test.p}
        rows.append({"measure": metric} | {name: float(end) for name, end in ends.items()} | counts)
    return pd.DataFrame(rows)


def _metric_row(found: xr.Dataset, metric: str, confidence: float) -> dict[str, float | int]:
    one = found.sel(metric=metric)
    values = one["value"].to_numpy()
    of = clusters_of(found)
    row = _share(values, one["left_out"].to_numpy(), _unread(found, NEEDS[metric]), confidence, of)
    control = _control(found, metric)
    if control is None:
        return row
    control[np.isnan(values)] = np.nan
    share = share_interval(control, of, confidence=confidence)
    ends = {"control": share.value, "control_low": share.low, "control_high": share.high}
    p = mcnemar(values, control, of).p
    return row | {name: float(value) for name, value in ends.items()} | {"p": float(p)}


def _control(found: xr.Dataset, metric: str) -> Float[np.ndarray, " example"] | None:
    """1, 0 or NaN per example: black right and image wrong (vis); image and black right (v2r). None: there is none."""
    if metric == "rea" or "black" not in found["variant"]:
        return None
    image, black = (found["right"].sel(variant=name).to_numpy() for name in ("image", "black"))
    value = ((black == 1) & ((image == 1) == (metric == "v2r"))).astype(float)
    return np.where(np.isnan(image) | np.isnan(black), np.nan, value)


def _share(
    values: Float[np.ndarray, " example"],
    why: Shaped[np.ndarray, " example"],
    unread: Bool[np.ndarray, " example"],
    confidence: float,
    clusters: np.ndarray | None,
) -> dict[str, float | int]:
    there = ~np.isnan(values)
    share = share_interval(values, clusters, confidence=confidence)
    return {
        "value": float(share.value),
        "low": float(share.low),
        "high": float(share.high),
        "n": int(there.sum()),
        "left_out": int((~there & ~np.isin(why, APART)).sum()),
        "no_answer": int((there & unread).sum()),
        "control": np.nan,
        "control_low": np.nan,
        "control_high": np.nan,
        "p": np.nan,
    }


def _unread(found: xr.Dataset, variants: Sequence[str]) -> Bool[np.ndarray, " example"]:
    return (found["note"].sel(variant=list(variants)).to_numpy() != "").any(0)
