"""Routes of two models as a table: effects, controls and paired differences, with intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from hooks import FrankenlensError
from interp.questions.examples import clusters_of
from interp.statistics import Interval, adjust, difference_interval, mean_interval, mean_test


def route_table(
    found: xr.Dataset,
    *,
    models: tuple[str, str] = ("in", "rl"),
    relative: bool = False,
    correction: str = "holm",
    **settings,
) -> pd.DataFrame:
    """The effect of every cut in two models and its difference, paired by example.

    Args:
        found: what `routes` returns.
        models: before and after; the second less the first is the difference.
        relative: the change of exp(metric) in % of its clean value (of a log-probability: the relative change of the
            probability of 2411.18620), not the change of the metric.
        correction: of the p values, over all routes and windows: "holm" or "bh".
        settings: as in `interp.statistics.ratio_interval`.

    Returns:
        Columns route, window, first, last, control_kind, n, left_out; before, after, their controls and their clean
        metric (the more there is, the more a cut can take), each with _low and _high; difference and
        control_difference with theirs; p (of a mean difference of 0; `mean_test`), p_corrected.

    Raises:
        FrankenlensError: no such model.
    """
    known = found["model"].to_numpy().tolist()
    for model in models:
        if model not in known:
            raise FrankenlensError(f"{model!r} is none of {', '.join(known)}")
    settings = {"clusters": clusters_of(found), **settings}
    sides = {}
    for name in ("value", "control"):
        effect = found[name] - found["clean"]
        effect = 100 * np.expm1(effect) if relative else effect
        both = (
            effect.sel(model=list(models))
            .stack(cell=("route", "window"))
            .transpose("model", "cell", "example")
        )
        sides[name] = both.to_numpy()
    columns: dict[str, np.ndarray] = {}
    for m, model in enumerate(("before", "after")):
        for name, label in (("value", model), ("control", f"{model}_control")):
            columns |= _interval(label, mean_interval(sides[name][m], **settings))
        level = mean_interval(found["clean"].sel(model=models[m]).to_numpy()[None], **settings)
        level = level[np.zeros(len(sides["value"][m]), dtype=int)]
        columns |= _interval(f"{model}_clean", level)
    for name, label in (("value", "difference"), ("control", "control_difference")):
        columns |= _interval(label, difference_interval(sides[name][1], sides[name][0], **settings))
    p = mean_test(sides["value"][1] - sides["value"][0], clusters=settings["clusters"])
    n = (~np.isnan(sides["value"]).any(0)).sum(-1)
    n_windows = found.sizes["window"]
    cells = {name: np.repeat(found[name].to_numpy(), n_windows) for name in ("route", "control_kind")} | {
        name: np.tile(found[name].to_numpy(), found.sizes["route"]) for name in ("window", "first", "last")
    }
    own = {"p": p, "p_corrected": adjust(p, correction), "n": n, "left_out": found.sizes["example"] - n}
    table = pd.DataFrame(cells | columns | own)
    table.attrs |= {"units": "% of the clean value" if relative else found.attrs["units"], "models": models}
    return table


MADE_OF = {"bf16": "rl", "random": "in"}
"""Model that learnt nothing (`interp.decision.null_changes`) to the one it was made from."""


def null_route_table(found: xr.Dataset, **settings) -> pd.DataFrame:
    """The same differences for models that learnt nothing, each against the model that it was made from.

    Args:
        found: what `routes` returns with `nulls`.
        settings: relative, correction and the rest, as in `route_table`.

    Returns:
        The columns of `route_table`, and null (the model's name).
    """
    names = [name for name in found["model"].to_numpy().tolist() if name in MADE_OF]
    parts = [route_table(found, models=(MADE_OF[name], name), **settings).assign(null=name) for name in names]
    return pd.concat(parts, ignore_index=True)


def _interval(label: str, interval: Interval) -> dict[str, np.ndarray]:
    return {label: interval.value, f"{label}_low": interval.low, f"{label}_high": interval.high}
