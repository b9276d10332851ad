"""A run over its steps as one table."""

from __future__ import annotations

import pandas as pd
import xarray as xr

from hooks.errors import FrankenlensError
from interp.trajectory.heads import top_heads

_OF_CELLS = (
    *("share", "share_low", "share_high", "effect_mean", "effect_mean_low", "effect_mean_high"),
    *("margin", "p_random", "beyond", "n"),
)


def step_table(data: xr.Dataset, k: int | None = None) -> pd.DataFrame:
    """One row per step, direction, component and role, and one per step and address that is no component of the map.

    Columns: step, checkpoint, direction, component (an address), role; share and effect_mean with their ends, margin,
    p_random, beyond and n of the map (`over_steps`); in_top, of heads; fro_norm and relative_norm of the address's
    update; accuracy and decided of the step.

    Args:
        data: what `over_steps` returns.
        k: of `top_heads`.
    """
    cells = data[list(_OF_CELLS)].to_dataframe().reset_index()
    columns = ["step", "direction", "component", "role", *_OF_CELLS]
    tables = [cells[columns].assign(in_top=_in_top(data, cells, k))]
    inside = set(data["component"].to_numpy())
    outside = pd.DataFrame(
        [
            (step, address)
            for step in data["step"].to_numpy()
            for address in data["address"].to_numpy()
            if address not in inside
        ],
        columns=["step", "component"],
    )
    table = pd.concat([tables[0], outside], ignore_index=True)
    energy = data[["fro_norm", "relative_norm"]].to_dataframe().reset_index()
    energy = energy.rename(columns={"address": "component"})[
        ["step", "component", "fro_norm", "relative_norm"]
    ]
    steps = (
        data[["accuracy", "decided"]]
        .to_dataframe()
        .reset_index()[["step", "accuracy", "decided", "checkpoint"]]
    )
    return table.merge(energy, on=["step", "component"], how="left").merge(steps, on="step", how="left")


def _in_top(data: xr.Dataset, cells: pd.DataFrame, k: int | None) -> list[bool | None]:
    """Whether each row's head is in the top set of its step and direction; None of what is no head."""
    known: dict[tuple[str, int, str], bool] = {}
    for direction in data["direction"].to_numpy():
        try:
            top = top_heads(data, k, str(direction))
        except FrankenlensError:  # no heads, or one
            continue
        for step in top["step"].to_numpy():
            for head in top["component"].to_numpy():
                known[str(direction), int(step), str(head)] = bool(top.sel(step=step, component=head))
    keys = zip(cells["direction"], cells["step"], cells["component"], strict=True)
    return [known.get((str(d), int(s), str(c))) for d, s, c in keys]
