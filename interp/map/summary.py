"""From per-example effects of patching to recoveries with intervals and controls, and the strongest components.

What goes in is the dataset of `interp.map.component_map.component_map`; what comes out has its variables and these, per
direction, component and role unless said otherwise:

    effect_mean             patched - recipient, in nats, mean over examples
    recovery                sum(patched - recipient) / sum(donor - recipient)
    control_other_recovery  the same with the donor's activation on another example
    excess                  recovery - control_other_recovery, over the examples that have both
    denominator             donor - recipient, in nats, mean over examples, per direction
    null_denominator        RL - IN of pairs that learnt nothing, in nats, per null pair, where they were run

each with `_low` and `_high`, the ends of its interval over examples (`interp.statistics.ratio_interval`); and the
attribute `refused`, which says why the recoveries and their controls are NaN throughout, and is "" where they are not.
A single cell is NaN too where the denominator of its own examples cannot be told from 0. `n` and `control_other_n`
count a cell's examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool

from hooks.errors import FrankenlensError, nearest
from interp.questions.examples import clusters_of
from interp.statistics import MIN_EXAMPLES, Interval, mean_interval, ratio_interval

CELLS = ("direction", "component", "role")
# states and second readings of the same head are in the map, but are no components of their own
RANKED_POINTS = (
    "attn_out",
    "cross_attn_out",
    "mixer_out",
    "mlp_out",
    "head",
    "expert",
    "vision",
    "projector",
)


def summarise(
    effects: xr.Dataset,
    *,
    nulls: Mapping[str, Interval] = MappingProxyType({}),
    refused: str = "",
    confidence: float = 0.95,
) -> xr.Dataset:
    """Add the variables listed at the top of this module.

    Args:
        effects: variables effect and control_other [direction component role example], recipient and donor
            [direction example].
        nulls: denominators of pairs that learnt nothing (`interp.decision.null_pair_denominator`).
        refused: why no recovery may be given (`interp.decision.recovery_refused`); "" where it may.
        confidence: as in `interp.statistics.ratio_interval`; examples of one cluster (coordinate `cluster`) are one
            unit.
    """
    settings = {"confidence": confidence, "clusters": clusters_of(effects)}
    units = effects.attrs.get("units", "nats")
    out = effects.copy()
    for name in ("effect", "control_other"):
        out[name] = effects[name].transpose(*CELLS, "example")
    effect, control = (out[name].to_numpy() for name in ("effect", "control_other"))
    difference = (effects["donor"] - effects["recipient"]).transpose("direction", "example").to_numpy()
    _add(out, "denominator", ("direction",), mean_interval(difference, **settings), units)
    _add(out, "effect_mean", CELLS, mean_interval(effect, **settings), units)
    shared = difference[:, None, None, :]
    for name, top in (
        ("recovery", effect),
        ("control_other_recovery", control),
        ("excess", effect - control),
    ):
        # A cell is a share of the denominator of its own examples: a role that few of them have may leave none.
        own = mean_interval(np.where(np.isnan(top), np.nan, shared), **settings, fewest=MIN_EXAMPLES)
        ratio = ratio_interval(top, shared, **settings)
        hidden = own.includes(0.0) | bool(refused)
        _add(out, name, CELLS, ratio, "1", hidden)
    out["n"] = (CELLS, (~np.isnan(effect)).sum(-1))
    out["control_other_n"] = (CELLS, (~np.isnan(control)).sum(-1))
    if nulls:
        out = out.assign_coords(null=list(nulls))
        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high")):
            out["null_denominator" + suffix] = ("null", [float(getattr(x, end)) for x in nulls.values()])
    out.attrs |= {"confidence": confidence, "refused": refused}
    return out


def _add(
    out: xr.Dataset,
    name: str,
    dims: tuple[str, ...],
    interval: Interval,
    units: str,
    hidden: Bool[np.ndarray, "*cells"] | None = None,
) -> None:
    for suffix, values in (("", interval.value), ("_low", interval.low), ("_high", interval.high)):
        out[name + suffix] = (
            dims,
            values if hidden is None else np.where(hidden, np.nan, values),
            {"units": units},
        )


def strongest(
    summary: xr.Dataset, direction: str, k: int = 10, points: Sequence[str] = RANKED_POINTS
) -> pd.DataFrame:
    """The `k` components with the largest |recovery|, each at the role where it acts most.

    Where recovery is refused, the effect takes its place. The role "all" counts only for a component that has no
    other. The ranking looks at many cells, so the strongest of them are biased upward.

    Returns:
        One row per component, strongest first: component, point, role, n, and value, `_low` and `_high` of
        effect_mean, recovery, control_other_recovery and excess; control_self.

    Raises:
        FrankenlensError: the direction is not in the map.
    """
    known = [str(name) for name in summary["direction"].to_numpy()]
    if direction not in known:
        hint = nearest(direction, known)
        raise FrankenlensError(
            f"The map has no direction {direction!r}, only {', '.join(known)}. {hint}".strip()
        )
    names = [
        name + suffix
        for name in ("effect_mean", "recovery", "control_other_recovery", "excess")
        for suffix in ("", "_low", "_high")
    ]
    one = summary.sel(direction=direction)
    one = one.isel(component=np.isin(one["point"].to_numpy(), list(points)))
    columns = [
        *names,
        "n",
        "control_other_n",
        *(["control_self"] if "control_self" in one and one["control_self"].ndim else []),
    ]
    ranked = "effect_mean" if summary.attrs["refused"] else "recovery"
    table = one[columns].to_dataframe().reset_index().dropna(subset=[ranked])
    table["size"] = table[ranked].abs()
    table["whole"] = table["role"] == "all"
    best = (
        table.sort_values(["whole", "size"], ascending=[True, False], kind="stable")
        .groupby("component")
        .head(1)
    )
    best = best.sort_values("size", ascending=False, kind="stable").head(k)
    return best[["component", "point", "role", *columns]].reset_index(drop=True)


def cell_table(summary: xr.Dataset) -> pd.DataFrame:
    """Tidy: one row per direction, component and role, every number with its interval.

    Per-example values stay in the dataset. Rows without examples are kept, with n = 0 and empty values.
    """
    columns = [name for name, data in summary.data_vars.items() if data.dims and set(data.dims) <= set(CELLS)]
    table = summary[columns].to_dataframe(dim_order=CELLS).reset_index()
    front = [*CELLS[:2], *(c for c in ("point", "layer", "head") if c in table), "role", "n"]
    return table[front + [c for c in columns if c not in front]]


def headline(summary: xr.Dataset) -> tuple[str, Interval]:
    """What a recovery of 1 is worth: RL − IN in the map of a pair, whichever directions it has; else donor − recipient.

    Returns:
        What is subtracted from what, and the difference, one cell, in the units of the metric.
    """
    known = [str(name) for name in summary["direction"].to_numpy()]
    direction = next((name for name in ("rl_to_in", "in_to_rl") if name in known), known[0])
    value, low, high = (
        summary["denominator" + suffix].sel(direction=direction).to_numpy()
        for suffix in ("", "_low", "_high")
    )
    n = np.asarray(summary["recipient"].sel(direction=direction).notnull().sum())
    what = "RL − IN" if direction in ("rl_to_in", "in_to_rl") else "donor − recipient"
    if direction == "in_to_rl":
        value, low, high = np.negative(value), np.negative(high), np.negative(low)
    return what, Interval(*(np.asarray(x) for x in (value, low, high, n)))


def now_and_before(
    two_by_two: xr.DataArray,
    *,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """What RL's weights change at the decision itself, and what through the prefix they wrote before it.

    Args:
        two_by_two: the metric, dims (weights, prefix, example) with coordinates "in" and "rl"
            (`interp.decision.two_by_two`).

    Returns:
        Mean over examples, with paired intervals: `now`, RL's weights on IN's prefix minus IN; `before`, IN's
        weights on RL's prefix minus IN; `together`, what RL adds beyond the sum of the two.
    """
    at = {
        (weights, prefix): two_by_two.sel(weights=weights, prefix=prefix).to_numpy()
        for weights in ("in", "rl")
        for prefix in ("in", "rl")
    }
    differences = {
        "now": at["rl", "in"] - at["in", "in"],
        "before": at["in", "rl"] - at["in", "in"],
        "together": at["rl", "rl"] - at["rl", "in"] - at["in", "rl"] + at["in", "in"],
    }
    settings = {"confidence": confidence, "clusters": clusters_of(two_by_two.to_dataset(name="metric"))}
    return {name: mean_interval(values, **settings) for name, values in differences.items()}
