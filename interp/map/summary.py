"""From per-example effects of patching to recoveries with intervals and controls, and the strongest components.

What goes in is the dataset of `interp.map.component_map.component_map`; what comes out has its variables and these, per
direction, component and role unless said otherwise:

    effect_mean             patched - recipient, in nats, mean over examples
    recovery                sum(patched - recipient) / sum(donor - recipient)
    random_recovery         |recovery| of random directions as large as the donor's difference, mean over draws
    excess                  |recovery| - random_recovery
    control_other_recovery  recovery of the donor's difference on another example
    specific                recovery - control_other_recovery, positive where this example's own moves more
    denominator             donor - recipient, in nats, mean over examples, per direction
    null_denominator        RL - IN of pairs that learnt nothing, in nats, per null pair, where they were run

each with `_low` and `_high`, the ends of its interval over examples (`interp.statistics.ratio_interval`), and

    floor    what cells of its kind reach in noise pairs (`interp.map.noise`), in nats; only where these were run
    p_random, p_specific, p_general
             chance of an effect so far above random directions, of one so far above that of the donor's difference on
             another example, and of that one so far above it, if the two could change places
             (`interp.statistics.swap_test`, one-sided)
    margin   |effect_mean| - the larger of floor and random directions, in nats: what components are ranked by
    reason   why a cell has no margin and is not beyond control, "" where it has one: a value is infinite, its own, of a
             random direction or of a noise pair; only where there is such a cell
    beyond   whether the cell is beyond control: |effect_mean| lies above the floor, and p_random is at most `ALPHA`

and the attribute `refused`, which says why the recoveries and their controls are NaN throughout and nothing is beyond
control, and is "" where they are not. Magnitudes are compared, so that both directions of patching are judged alike.
The mark needs no interval, and holds for few examples too; where there are too few for intervals their ends are NaN. A
single cell is NaN where the denominator of its own examples cannot be told from 0. `n` and `control_other_n` count a
cell's examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from hooks.errors import FrankenlensError, nearest
from interp.map.noise import floor_of
from interp.questions.examples import clusters_of
from interp.statistics import MIN_EXAMPLES, Interval, mean_interval, ratio_interval, swap_test
from interp.statistics.means import INFINITE

CELLS = ("direction", "component", "role")
SHARES = ("recovery", "random_recovery", "excess", "control_other_recovery", "specific")
READ_OF_CELLS = (
    *(name + end for name in ("effect_mean", *SHARES) for end in ("", "_low", "_high")),
    *("margin", "p_random", "p_specific", "p_general", "beyond", "n", "control_other_n"),
)
"""What `strongest` reads of every cell of a summary."""
ENDLESS_FLOOR = "a noise pair's value is infinite"
ALPHA = 0.025
"""A cell is above random directions at this p, one-sided: the lower end of a 95 % interval."""
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
    noise: xr.Dataset | None = None,
    nulls: Mapping[str, Interval] = MappingProxyType({}),
    refused: str = "",
    confidence: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Add the variables listed at the top of this module.

    Args:
        effects: variables effect and control_other [direction component role example], control_random with an axis draw
            beside these, recipient and donor [direction example].
        noise: the cells of noise pairs (`interp.map.noise.noise_cells`), which are kept in what is returned; without
            them there is no floor, and `beyond` compares with random directions alone.
        nulls: denominators of pairs that learnt nothing (`interp.decision.null_pair_denominator`).
        refused: why no recovery may be given (`interp.decision.recovery_refused`); "" where it may.
        confidence: as in `interp.statistics.ratio_interval`; examples of one cluster (coordinate `cluster`) are one
            unit.
        seed: of the swaps of the test against random directions (`interp.statistics.swap_test`).
    """
    settings = {"confidence": confidence, "clusters": clusters_of(effects)}
    units = effects.attrs.get("units", "nats")
    out = effects.copy()
    for name in ("effect", "control_other"):
        out[name] = effects[name].transpose(*CELLS, "example")
    effect, other = (out[name].to_numpy() for name in ("effect", "control_other"))
    random = effects["control_random"].transpose("draw", *CELLS, "example").to_numpy()
    difference = (effects["donor"] - effects["recipient"]).transpose("direction", "example").to_numpy()
    _add(out, "denominator", ("direction",), mean_interval(difference, **settings), units)
    _add(out, "effect_mean", CELLS, mean_interval(effect, **settings), units)
    shared = difference[:, None, None, :]
    way = np.sign(_mean(shared))  # of the denominator
    turned, as_large = turned_up(effect), turned_up(random).mean(0)
    for name, top in (
        ("recovery", effect),
        ("random_recovery", way * as_large),
        ("excess", way * (turned - as_large)),
        ("control_other_recovery", other),
        ("specific", way * np.sign(_mean(effect)) * (effect - other)),
    ):
        # A cell is a share of the denominator of its own examples: a role that few of them have may leave none.
        own = mean_interval(np.where(np.isnan(top), np.nan, shared), **settings, fewest=MIN_EXAMPLES)
        ratio = ratio_interval(top, shared, **settings)
        hidden = own.includes(0.0) | bool(refused)
        _add(out, name, CELLS, ratio, "1", hidden)
    floor, why = None, np.where(np.isinf(effect).any(-1) | np.isinf(random).any((0, -1)), INFINITE, "")
    if noise is not None:
        own = noise.reindex({name: out[name].to_numpy() for name in CELLS[1:]})
        out = out.merge(own, combine_attrs="override")
        floor, endless = (
            np.broadcast_to(one, effect.shape[:-1]) for one in floor_of(own, out["effect_mean"])
        )
        why = np.where((why == "") & endless, ENDLESS_FLOOR, why)
        out["floor"] = (CELLS, floor, {"units": units})
    swapped = {"clusters": clusters_of(effects), "seed": seed}
    p = swap_test(effect, random, **swapped)
    out["p_specific"] = (CELLS, swap_test(effect, other[None], **swapped))
    out["p_general"] = (CELLS, swap_test(other, effect[None], **swapped))
    mean, of_random = _mean(turned)[..., 0], _mean(as_large)[..., 0]
    above, margin = beyond_control(mean, of_random, p, floor)
    if (why != "").any():  # no mean, so nothing that it could be compared by
        above, margin = above & (why == ""), np.where(why == "", margin, np.nan)
        out["reason"] = (CELLS, why)
    out["p_random"] = (CELLS, p)
    out["beyond"] = (CELLS, above & (not refused))
    out["margin"] = (CELLS, margin, {"units": units})
    out["n"] = (CELLS, (~np.isnan(effect)).sum(-1))
    out["control_other_n"] = (CELLS, (~np.isnan(other)).sum(-1))
    if nulls:
        out = out.assign_coords(null=list(nulls))
        for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high")):
            out["null_denominator" + suffix] = ("null", [float(getattr(x, end)) for x in nulls.values()])
    out.attrs |= {"confidence": confidence, "refused": refused}
    return out


def beyond_control(
    effect: Float[np.ndarray, "*cells"],
    random: Float[np.ndarray, "*cells"],
    p: Float[np.ndarray, "*cells"],
    floor: Float[np.ndarray, "*cells"] | None = None,
) -> tuple[Bool[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """Which cells are beyond control, and by how much their mean lies above both controls.

    Args:
        effect, random: |mean| of the donor's activation, and of random directions.
        p: of the test between the two (`interp.statistics.swap_test`).
        floor: of every cell; NaN: none is known, so that the cell is not beyond it. None: there are no noise pairs.
    """
    above = p <= ALPHA
    if floor is None:
        return above, effect - random
    return above & (effect > floor), effect - np.fmax(random, floor)


def turned_up(values: Float[np.ndarray, "*cells example"]) -> Float[np.ndarray, "*cells example"]:
    """The same with the sign at which a cell's mean over examples is positive: its mean is |mean|."""
    with np.errstate(invalid="ignore"):
        return values * np.sign(_mean(values))


def _mean(values: Float[np.ndarray, "*cells example"]) -> Float[np.ndarray, "*cells 1"]:
    """Over the examples that have a value; NaN where none has."""
    there = ~np.isnan(values)
    n = there.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinite values of both signs have no mean
        return np.where(there, values, 0).sum(-1, keepdims=True) / np.where(n > 0, n, np.nan)


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
    """The `k` components that lie farthest above their controls (`margin`), each at the role where it does most.

    The role "all" counts only for a component that has no other. The ranking looks at many cells, so the strongest of
    them are biased upward.

    Returns:
        One row per component, strongest first: component, point, role, n, and value, `_low` and `_high` of
        effect_mean, recovery, random_recovery, excess, control_other_recovery and specific; floor, where there is one;
        margin, p_random, p_specific, p_general, beyond,
        control_self.

    Raises:
        FrankenlensError: the direction is not in the map, or what is read of its cells is not.
    """
    if missing := [name for name in READ_OF_CELLS if name not in summary]:
        raise FrankenlensError(
            f"The map's cells have no {', '.join(missing)}: it is no summary, or an older one; make it again."
        )
    known = [str(name) for name in summary["direction"].to_numpy()]
    if direction not in known:
        hint = nearest(direction, known)
        raise FrankenlensError(
            f"The map has no direction {direction!r}, only {', '.join(known)}. {hint}".strip()
        )
    one = summary.sel(direction=direction)
    one = one.isel(component=np.isin(one["point"].to_numpy(), list(points)))
    columns = [
        *READ_OF_CELLS,
        *(["floor"] if "floor" in one else []),
        *(["control_self"] if "control_self" in one and one["control_self"].ndim else []),
    ]
    ranked = "effect_mean" if summary.attrs.get("refused") else "recovery"
    table = one[columns].to_dataframe().reset_index().dropna(subset=[ranked])
    table["whole"] = table["role"] == "all"
    best = (
        table.sort_values(["whole", "margin"], ascending=[True, False], kind="stable")
        .groupby("component")
        .head(1)
    )
    best = best.sort_values("margin", ascending=False, kind="stable").head(k)
    return best[["component", "point", "role", *columns]].reset_index(drop=True)


def in_words(p_specific: float, p_general: float) -> str:
    """Whether a cell's change is this example's own: moves more, or less, than the change of another example here."""
    if np.isnan(p_specific):
        return "–"  # no other example lines up
    if p_specific <= ALPHA:
        return "more than another example's"
    return "less than another example's" if p_general <= ALPHA else "as another example's"


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
