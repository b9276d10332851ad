"""Does the map's mark, "beyond control", tell what was planted from what was not? On pairs whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd

from hooks import Address, FrankenlensError, HookedVLM
from interp.decision import find_decisions, null_pair_denominator, recovery_refused
from interp.map import component_map, noise_cells, summarise
from interp.map.components import BEFORE_THE_DECODER, Component
from interp.map.summary import ALPHA, turned_up
from interp.planting.plants import Plant, told_apart, truth
from interp.planting.table import auroc, invisible
from interp.planting.trial import planted_pair
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.statistics import mean_interval, share_interval

WHERE = ("planted", "before", "after", "null")
"""What a cell is: changed; not, and computed before anything that was; not, but after; of a pair without a plant."""
COLUMNS = (
    "direction",
    "cells",
    "n_pairs",
    "n_cells",
    "marked",
    "low",
    "high",
    "by_random",
    "by_floor",
    "kept",
)


def marks(
    in_: HookedVLM,
    donor: HookedVLM,
    plant: Plant,
    examples: Sequence[Example],
    among: Sequence[Component],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    trace_format: TraceFormat | None = None,
    template: str | None = None,
    system: str | None = None,
    instruction: str = "",
) -> pd.DataFrame:
    """The map's mark on every component of a planted pair, at all its tokens, soft metric, both directions.

    Args:
        in_, donor, plant, examples, among, and so on: as of `interp.planting.trial`.

    Returns:
        One row per direction and component: where (of `WHERE`); effect (mean, nats), random and floor (what it is
        compared with, likewise), above_random, above_floor, beyond (both: the mark, whether or not the pair's
        recoveries are refused), margin (what the map ranks by), refused (why no recovery is given).

    Raises:
        FrankenlensError: no prompt can be scored.
    """
    known = told_apart(among, plant)
    changed = truth(known, plant).numpy()
    with planted_pair(in_, donor, plant, trace_format, template, system, instruction) as (pair, _):
        settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": False}
        decisions = find_decisions(pair, examples, "soft", **settings)
        if not len(decisions):
            raise FrankenlensError(f"no prompt can be scored on this pair ({dict(decisions.excluded)})")
        refused = recovery_refused(decisions, null_pair_denominator(pair, decisions, plant.seed, batch_size))
        points = tuple(dict.fromkeys(component.point for component in known))
        early = any(point in BEFORE_THE_DECODER for point in points)
        roles = ["all", "image"] if early else ["all"]
        running = {"batch_size": batch_size, "progress": False, "seed": plant.seed}
        effects = component_map(pair, decisions, points=points, roles=roles, further=(), **running)
        noise = noise_cells(pair, decisions, points=points, roles=roles, **running)
    summary = summarise(effects, noise=noise, seed=plant.seed)
    random = summary["control_random"].transpose("draw", *summary["effect"].dims).to_numpy()
    summary["random"] = summary["beyond"].dims, turned_up(random).mean(0).mean(-1)
    first = min((_order(one.name) for one, own in zip(known, changed, strict=True) if own), default=None)
    rows = []
    for direction in map(str, summary["direction"].to_numpy()):
        for component, own in zip(known, changed, strict=True):
            role = "image" if component.point in BEFORE_THE_DECODER else "all"
            one = summary.sel(direction=direction, component=component.name, role=role)
            order = _order(component.name)
            where = "planted" if own else "null" if first is None else "before" if order <= first else "after"
            effect, floor = float(one["effect_mean"]), float(one["floor"])
            row: dict[str, object] = {
                "direction": direction,
                "component": component.name,
                "where": where,
                "effect": effect,
            }
            row |= {
                "random": float(one["random"]),
                "floor": floor,
                "above_random": bool(one["p_random"] <= ALPHA),
            }
            row |= {"above_floor": abs(effect) > floor, "beyond": bool(one["beyond"])}
            rows.append(row | {"margin": float(one["margin"]), "refused": refused})
    return pd.DataFrame(rows)


def _order(name: str) -> tuple[int, int]:
    """When a component is computed: heads of a layer at once, then its MLP; what lies before the decoder first."""
    address = Address.parse(name)
    if address.kind != "blocks" or address.tower != "text" or address.layers is None:
        return (-1, 0)
    return address.layers[0], 0 if address.sub == "attn" else 1


def mark_table(cells: pd.DataFrame, plants: pd.DataFrame) -> pd.DataFrame:
    """How often cells of each sort are marked; intervals (95 %) take the cells of one pair for one cluster.

    Args:
        cells: rows of `marks` with columns pair and kind.
        plants: as in `interp.planting.table.invisible`.

    Returns:
        One row per direction and sort of cells (visible plants, invisible plants, unplanted before the first plant and
        after it, null cells, null cells by kind): n_pairs, n_cells, marked (share of cells) with low
        and high, by_random and by_floor (shares that pass one of the two), kept (share that is marked if no
        cell of a pair is whose recoveries are refused). Last rows: AUROC, of plants against the rest of their pair, by
        margin; and the same without invisible plants.
    """
    hidden = set(map(tuple, plants.loc[invisible(plants), ["pair", "component"]].to_numpy()))
    unseen = np.array([key in hidden for key in zip(cells["pair"], cells["component"], strict=True)])
    rows = []
    for direction in dict.fromkeys(cells["direction"]):
        here = (cells["direction"] == direction).to_numpy()
        planted = (cells["where"] == "planted").to_numpy()
        sorts = {"visible plants": planted & ~unseen, "invisible plants": planted & unseen}
        sorts |= {
            "unplanted, before the first plant": (cells["where"] == "before").to_numpy(),
            "unplanted, after it": (cells["where"] == "after").to_numpy(),
            "null cells": (cells["where"] == "null").to_numpy(),
        }
        kinds = dict.fromkeys(cells.loc[cells["where"] == "null", "kind"])
        sorts |= {
            f"null cells, {kind}": ((cells["where"] == "null") & (cells["kind"] == kind)).to_numpy()
            for kind in kinds
        }
        for name, chosen in sorts.items():
            some = cells.loc[here & chosen]
            if len(some):
                rows.append(_row(direction, name, some))
        for name, kept in (("AUROC", here), ("AUROC, visible plants", here & ~unseen)):
            rows.append(_auroc_row(direction, name, cells.loc[kept & (cells["where"] != "null")]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(direction: str, name: str, some: pd.DataFrame) -> dict[str, object]:
    kept = (some["beyond"] & (some["refused"] == "")).mean()
    share = share_interval(some["beyond"].to_numpy(float), some["pair"].to_numpy())
    row: dict[str, object] = {
        "direction": direction,
        "cells": name,
        "n_pairs": some["pair"].nunique(),
        "n_cells": len(some),
    }
    row |= {"marked": float(share.value), "low": float(share.low), "high": float(share.high)}
    row |= {"by_random": float(some["above_random"].mean()), "by_floor": float(some["above_floor"].mean())}
    return row | {"kept": float(kept)}


def _auroc_row(direction: str, name: str, some: pd.DataFrame) -> dict[str, object]:
    found = []
    for _, one in some.groupby("pair"):
        changed = (cast("pd.Series", one["where"]) == "planted").to_numpy()
        if changed.any() and not changed.all():
            found.append(auroc(one["margin"].to_numpy(float), changed))
    interval = mean_interval(np.array(found))
    row: dict[str, object] = {
        "direction": direction,
        "cells": name,
        "n_pairs": len(found),
        "n_cells": len(some),
    }
    return row | {"marked": float(interval.value), "low": float(interval.low), "high": float(interval.high)}
