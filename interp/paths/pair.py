"""Paths across a pair: RL's changes into IN and IN's into RL, as shares of what the two models differ by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from hooks import FrankenlensError
from hooks.address import Address
from interp.map.component_map import DIRECTIONS
from interp.paths.effects import path_map
from interp.paths.in_order import paths_in_order
from interp.paths.path import Receiver
from interp.questions.examples import clusters_of, with_looked_at
from interp.statistics import MIN_EXAMPLES, adjust, mean_interval, mean_test, ratio_interval

if TYPE_CHECKING:
    from interp.decision import DecisionSet
    from interp.pair.pair import Pair


def pair_paths(
    pair: "Pair",
    decisions: "DecisionSet",
    *,
    senders: Sequence[str | Address] | None = None,
    receivers: Sequence[str | Receiver] | None = None,
    directions: Sequence[str] = tuple(DIRECTIONS),
    **settings: Any,
) -> xr.Dataset:
    """`path_map` between the two models of a pair, on the prompts of `decisions`.

    Args:
        pair: IN and RL, opened.
        decisions: what is measured, and the prompts up to each decision.
        senders, receivers: as in `path_map`; at least one of them.
        directions: "rl_to_in" (RL's value of the sender into IN), "in_to_rl".
        settings: where, between, control, batch_size, progress of `path_effects`.

    Returns:
        As `path_effects`, with a dimension direction in front; and in_order [direction sender example] (see
        `paths_in_order`), NaN for senders not all of whose paths are there.

    Raises:
        FrankenlensError: an unknown direction, neither senders nor receivers, no decision; as `path_map`.
    """
    unknown = [name for name in directions if name not in DIRECTIONS]
    if unknown or not directions:
        raise FrankenlensError(f"directions={list(directions)}; choose of {', '.join(DIRECTIONS)}.")
    if senders is None and receivers is None:
        raise FrankenlensError("every path of a model is too many: name senders, receivers or both.")
    decisions.require_some()
    models, found = {"in": pair.in_, "rl": pair.rl}, []
    for direction in directions:
        donor, recipient = DIRECTIONS[direction]
        call = (models[recipient], decisions.prompts, decisions.metric)
        one = path_map(*call, senders=senders, receivers=receivers, donor=models[donor], **settings)
        one["in_order"] = _in_order(one, call, {**settings, "donor": models[donor]})
        found.append(one)
    together = xr.concat(found, pd.Index(list(directions), name="direction"), combine_attrs="override")
    assert isinstance(together, xr.Dataset)
    return with_looked_at(together, decisions.examples)


def _in_order(effects: xr.Dataset, call: tuple[Any, Any, Any], settings: Mapping[str, Any]) -> xr.DataArray:
    """`paths_in_order` of the senders that have all their paths."""
    out = xr.full_like(effects["whole"], np.nan).rename("in_order")
    complete = effects["sender"].to_numpy()[effects["complete"].to_numpy()].tolist()
    if not complete or effects.attrs["between"] != "frozen":
        return out
    chosen = effects["path"].to_numpy()[np.isin(effects["path_sender"].to_numpy(), complete)].tolist()
    kept = {key: value for key, value in settings.items() if key not in ("between", "control")}
    found = paths_in_order(call[0], call[1], call[2], chosen, **kept)["in_order"]
    out.loc[{"sender": found["sender"]}] = found
    return out


def path_table(effects: xr.Dataset, *, refused: str = "", **settings: Any) -> pd.DataFrame:
    """Every path with intervals over examples, its control and a test.

    Args:
        effects: of `pair_paths` or `path_effects`.
        refused: why no recovery may be given (`interp.decision.recovery_refused`); "" where it may.
        settings: confidence, clusters of `interp.statistics.ratio_interval`.

    Returns:
        One row per direction and path: direction, path, sender, receiver, via, layer (of the receiver; the number of
        layers for the logits), n, direct (mean, the metric's units), recovery (sum of direct effects / sum of donor
        - recipient; NaN if refused), other_recovery (the control) and excess (recovery - control, over the examples
        that have both), each with _low and _high; other_n; p (of a mean direct effect of 0, two-sided; `mean_test`) and
        p_corrected (Holm over the paths of a direction).
    """
    effects = _with_direction(effects)
    settings = {"clusters": clusters_of(effects), **settings}
    tables = []
    for direction in effects["direction"].to_numpy():
        one = effects.sel(direction=direction)
        table = pd.DataFrame({"direction": str(direction), "path": one["path"].to_numpy()})
        for column, name in (("sender", "path_sender"), ("receiver",) * 2, ("via",) * 2, ("layer",) * 2):
            table[column] = one[name].to_numpy()
        direct = one["direct"].to_numpy()
        other = one["direct_other"].to_numpy() if "direct_other" in one else np.full_like(direct, np.nan)
        table = table.assign(**_shares(one, "direct", direct, other, refused, settings))
        p = mean_test(direct, clusters=settings["clusters"])
        tables.append(table.assign(p=p, p_corrected=adjust(p)))
    return pd.concat(tables, ignore_index=True)


def sender_table(effects: xr.Dataset, *, refused: str = "", **settings: Any) -> pd.DataFrame:
    """Every sender's whole effect, the sum of its direct effects, and the interaction between them.

    Args:
        effects, refused, settings: as in `path_table`.

    Returns:
        One row per direction and sender: n, whole, sum and interaction (means, the metric's units; the last two NaN
        for a sender not all of whose paths are there), recovery (of the whole), other_recovery, excess, each with
        _low and _high; in_order_gap (largest |in order - whole| of an example), where it was measured.
    """
    effects = _with_direction(effects)
    settings = {"clusters": clusters_of(effects), **settings}
    tables = []
    for direction in effects["direction"].to_numpy():
        one = effects.sel(direction=direction)
        whole, interaction = one["whole"].to_numpy(), one["interaction"].to_numpy()
        other = one["whole_other"].to_numpy() if "whole_other" in one else np.full_like(whole, np.nan)
        table = pd.DataFrame({"direction": str(direction), "sender": one["sender"].to_numpy()})
        table = table.assign(**_shares(one, "whole", whole, other, refused, settings))
        for name, values in (("sum", whole - interaction), ("interaction", interaction)):
            table = table.assign(**_interval(name, mean_interval(values, **settings)))
        if "in_order" in one:
            gap = np.abs(one["in_order"].to_numpy() - whole)
            table["in_order_gap"] = np.fmax.reduce(gap, axis=1)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _shares(
    one: xr.Dataset,
    name: str,
    values: Float[np.ndarray, "thing example"],
    other: Float[np.ndarray, "thing example"],
    refused: str,
    settings: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    difference = (one["donor"] - one["recipient"]).to_numpy()
    columns: dict[str, np.ndarray] = {"n": (~np.isnan(values)).sum(1)}
    columns |= _interval(name, mean_interval(values, **settings))
    for share, top in (("recovery", values), ("other_recovery", other), ("excess", values - other)):
        own = mean_interval(
            np.where(np.isnan(top), np.nan, difference), **{**settings, "fewest": MIN_EXAMPLES}
        )
        hidden = own.includes(0.0) | bool(refused)
        ratio = _interval(share, ratio_interval(top, difference, **settings))
        columns |= {key: np.where(hidden, np.nan, column) for key, column in ratio.items()}
    return columns | {"other_n": (~np.isnan(other)).sum(1)}


def _interval(name: str, interval: Any) -> dict[str, np.ndarray]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _with_direction(effects: xr.Dataset) -> xr.Dataset:
    return effects if "direction" in effects.dims else effects.expand_dims(direction=["donor_to_recipient"])
