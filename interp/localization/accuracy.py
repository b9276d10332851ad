"""How right a model is under each ablation, and what that is less than without, per function."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from interp.localization.outcomes import by_function
from interp.questions.examples import clusters_of
from interp.statistics import adjust, change_interval, mcnemar, share_of


def accuracy(found: xr.Dataset, correction: str = "holm", **settings) -> pd.DataFrame:
    """Accuracy under each ablation with Wilson's interval (by clusters), and its loss against the whole model, paired.

    Args:
        found: what `ablate` returns.
        correction: of the p values, "holm" or "bh", over the ablations of all functions ("all": over its own).
        settings: confidence of the change.

    Returns:
        Columns function (the example's task; "all": together), ablation, kind, layer, part, head, accuracy, low, high,
        whole, whole_low, whole_high (of the model as it is), change, change_low, change_high (`change_interval`), p
        (McNemar, exact), p_corrected, parsed, n, left_out.
    """
    rows = []
    for name, chosen in by_function(found, "task"):
        clean = chosen["clean"].to_numpy()
        for k in range(chosen.sizes["ablation"]):
            right = chosen["right"].to_numpy()[k]
            of = clusters_of(chosen)
            share, change = share_of(right, of), change_interval(right, clean, of, **settings)
            whole = share_of(np.where(np.isnan(right), np.nan, clean), of)
            rows.append(
                {
                    "function": name,
                    **{
                        key: chosen[key].to_numpy()[k]
                        for key in ("ablation", "kind", "layer", "part", "head")
                    },
                    **dict(zip(("accuracy", "low", "high"), share, strict=True)),
                    **dict(zip(("whole", "whole_low", "whole_high"), whole, strict=True)),
                    "change": float(change.value),
                    "change_low": float(change.low),
                    "change_high": float(change.high),
                    "p": mcnemar(right, clean, of).p,
                    "p_corrected": np.nan,
                    "parsed": float(chosen["parsed"][k].mean()),
                    "n": int(change.n),
                    "left_out": int(np.isnan(right).sum()),
                }
            )
    table = pd.DataFrame(rows)
    together = table["function"] == "all"
    for family in (together, ~together):
        table.loc[family, "p_corrected"] = adjust(table.loc[family, "p"].to_numpy(), correction)
    return table
