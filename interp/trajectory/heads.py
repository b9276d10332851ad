"""Which heads are among the strongest at every step of a run, and how long they stay.

Heads switch on and off over RL steps (2509.25758), which two endpoints cannot show.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from hooks.errors import FrankenlensError

TOP = 10
"""Heads of the top set, where a quarter of all is no less."""


def top_heads(data: xr.Dataset, k: int | None = None, direction: str | None = None) -> xr.DataArray:
    """Whether each head is in the top set of each step [step component].

    The top set are the k heads that lie farthest above random directions as large as the donor's difference
    (`margin`), each at the tokens where it does.

    Args:
        data: what `over_steps` returns.
        k: by default `TOP`, or a quarter of the heads where that is fewer.
        direction: by default the first.

    Raises:
        FrankenlensError: no heads were patched, or there are no more than k.
    """
    direction = str(data["direction"].to_numpy()[0]) if direction is None else direction
    heads = data["margin"].sel(direction=direction)
    heads = heads.isel(component=np.flatnonzero(data["point"].to_numpy() == "head"))
    n = heads.sizes["component"]
    if not n:
        raise FrankenlensError('no heads were patched: give points=("head", ...)')
    k = max(1, min(TOP, n // 4)) if k is None else k
    if not 0 < k < n:
        raise FrankenlensError(f"k is {k}; give 1 to {n - 1}: there are {n} heads")
    strength = heads.max("role").transpose("step", "component").fillna(-np.inf)
    order = np.argsort(-strength.to_numpy(), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(n)[None].repeat(len(order), 0), axis=1)
    return strength.copy(data=rank < k).assign_attrs(k=k, n_heads=n, direction=direction).rename("in_top")


def head_survival(data: xr.Dataset, k: int | None = None, direction: str | None = None) -> pd.DataFrame:
    """How much of the top set of heads stays from step to step.

    Args:
        data, k, direction: as of `top_heads`.

    Returns:
        One row per step: of_reference (share of its top set that is in that of the reference checkpoint too),
        of_last_step (share that is in that of the step before; NaN at the first), entered and left (heads since the
        step before), chance (share that two sets of this size drawn at random have in common, k / heads), k, n_heads.
    """
    top = top_heads(data, k, direction)
    sets = [set(top["component"].to_numpy()[row]) for row in top.to_numpy()]
    steps = [int(step) for step in top["step"].to_numpy()]
    last = sets[steps.index(int(data.attrs["reference"]))]
    size, n = top.attrs["k"], top.attrs["n_heads"]
    rows = []
    for i, (step, own) in enumerate(zip(steps, sets, strict=True)):
        before = sets[i - 1] if i else None
        rows.append(
            {
                "step": step,
                "of_reference": len(own & last) / size,
                "of_last_step": np.nan if before is None else len(own & before) / size,
                "entered": 0 if before is None else len(own - before),
                "left": 0 if before is None else len(before - own),
                "chance": size / n,
                "k": size,
                "n_heads": n,
            }
        )
    return pd.DataFrame(rows)
