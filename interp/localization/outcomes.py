"""What an intervention did to an answer, and the shares of each outcome with intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import xarray as xr

from interp.examples import Example
from interp.statistics import wilson_interval

Grader = Callable[[str | None, Example], bool]
"""Whether an answer (None: there is none) is right for an example."""
OUTCOMES = ("unchanged", "source", "broke")
NOT_COUNTED = "pairs that cannot show a change: see the variable why"


def outcome(
    answer: str | None,
    clean: str,
    on_source: str,
    target: Example,
    source: Example,
    grader: Grader,
) -> str:
    """Which of `OUTCOMES` an answer is.

    "unchanged": the model's own answer, or one that is right for the target; "source": what the model says of the
    source image, or what is right for it; "broke": anything else, or no answer. The model's own two answers, which
    differ, are looked at first.
    """
    if answer is None:
        return "broke"
    if answer == clean:
        return "unchanged"
    if answer == on_source or grader(answer, source):
        return "source"
    return "unchanged" if grader(answer, target) else "broke"


def outcome_shares(found: xr.Dataset, confidence: float = 0.95) -> pd.DataFrame:
    """Share of each outcome per swap and function, with Wilson's intervals.

    Columns: swap, first, last, what, function ("all": together), outcome ("changed": source or broke, the paper's
    change rate), value, low, high, n, left_out.
    """
    rows = []
    functions = found["function"].to_numpy()
    names = list(dict.fromkeys(functions.tolist()))
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        chosen = found.isel(example=np.flatnonzero((functions == name) | (name == "all")))
        for k in range(chosen.sizes["swap"]):
            values = chosen["outcome"].isel(swap=k).to_numpy()
            there = values[~np.isnan(values)]
            labels = {label: int((there == i).sum()) for i, label in enumerate(OUTCOMES)}
            for label, count in {**labels, "changed": len(there) - labels["unchanged"]}.items():
                share = wilson_interval(count, len(there), confidence=confidence)
                rows.append(
                    {
                        **{key: chosen[key].to_numpy()[k] for key in ("swap", "first", "last", "what")},
                        "function": name,
                        "outcome": label,
                        "value": float(share.value),
                        "low": float(share.low),
                        "high": float(share.high),
                        "n": len(there),
                        "left_out": int(np.isnan(values).sum()),
                    }
                )
    return pd.DataFrame(rows)
