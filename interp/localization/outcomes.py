"""What an intervention did to an answer, and the shares of each outcome with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from hooks.errors import FrankenlensError
from interp.questions.examples import Example, clusters_of
from interp.questions.grading import Ungraded
from interp.statistics import mean_interval, share_interval

Grader = Callable[[str | None, Example], bool]
"""Whether an answer (None: there is none) is right for an example, compared with `example.answer`; may raise
`interp.questions.grading.Ungraded`."""
OUTCOMES = ("unchanged", "source", "broke")
AMONG = ("differing", "all")
"""Pairs that are counted: those whose two clean answers differ, or all whose clean answers can be read."""
NOT_COUNTED = "pairs without a clean answer on both images: see the variable why"


def outcome(
    answer: str | None,
    clean: str,
    on_source: str,
    target: Example,
    source: Example,
    grader: Grader,
) -> str:
    """Which of `OUTCOMES` an answer is; the reference is what the model itself answered, right or wrong.

    "unchanged": the model's own answer, also in another form; "source": what the model says of the source image, or
    what is right for it; "broke": any third answer, one that the grader cannot read, or none. So an intervention never
    decides whether a pair is counted.
    """
    if answer is None:
        return "broke"
    if any(_surely(grader, *two) for two in _both_ways(answer, clean, target)):
        return "unchanged"
    as_source = (*_both_ways(answer, on_source, source), (answer, source))
    return "source" if any(_surely(grader, *two) for two in as_source) else "broke"


def _both_ways(one: str, other: str, example: Example) -> tuple[tuple[str, Example], ...]:
    """Each text with the example whose reference is the other."""
    return (one, replace(example, answer=other)), (other, replace(example, answer=one))


def _surely(grader: Grader, answer: str, example: Example) -> bool:
    """Whether an answer is right for an example, as far as the grader can tell."""
    try:
        return answer == example.answer or grader(answer, example)
    except Ungraded:
        return False


def same_answer(one: str, other: str, example: Example, grader: Grader) -> bool:
    """Whether one text is the other, or would be right for the example if the other were its reference.

    Raises:
        Ungraded: the grader cannot tell.
    """
    return one == other or any(grader(*two) for two in _both_ways(one, other, example))


def outcome_shares(found: xr.Dataset, among: str = "differing", confidence: float = 0.95) -> pd.DataFrame:
    """Share of each outcome per swap and function, with Wilson's intervals.

    Args:
        found: what `vision_swap` returns.
        among: of `AMONG`. Only where the two clean answers differ can the source's be told from the model's own; the
            paper's change rate is over all pairs.
        confidence: of the intervals.

    Returns:
        Columns swap, first, last, what, function ("all": together), outcome ("changed": source or broke, or what
        `interp.localization.changes.with_changes` took for changed; the paper's change rate), value, low, high, n,
        left_out.

    Raises:
        FrankenlensError: another `among`.
    """
    rows = []
    for name, chosen in by_function(_counted(found, among), "function"):
        for k in range(chosen.sizes["swap"]):
            values = chosen["outcome"].isel(swap=k).to_numpy()
            there = values[~np.isnan(values)]
            changed = _changed(chosen)[k]
            hits = {
                label: np.where(np.isnan(values), np.nan, values == i) for i, label in enumerate(OUTCOMES)
            }
            for label, hit in {**hits, "changed": changed}.items():
                share = share_interval(hit, clusters_of(chosen), confidence=confidence)
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


def layer_contributions(found: xr.Dataset, among: str = "differing", **settings) -> pd.DataFrame:
    """CR(k) − CR(k + 1) of suffix swaps: what layer k adds to the change rate (2602.12395), paired by example.

    CR of the suffix behind the last layer is 0: nothing is swapped.

    Args:
        found: what `vision_swap` returns for `suffixes`, in their order.
        among: as in `outcome_shares`.
        settings: as in `interp.statistics.ratio_interval`.

    Returns:
        Columns layer, function, value, low, high, n, left_out.

    Raises:
        FrankenlensError: the swaps are not the suffixes from every layer on, or another `among`.
    """
    firsts, lasts = found["first"].to_numpy(), found["last"].to_numpy()
    if not (np.array_equal(firsts, np.arange(len(firsts))) and (lasts == len(firsts) - 1).all()):
        raise FrankenlensError(
            "CR(k) − CR(k+1) needs the suffix swaps of every layer: vision_swap(..., suffixes(n))"
        )
    rows = []
    for name, chosen in by_function(_counted(found, among), "function"):
        changed = _changed(chosen)
        behind = np.concatenate([changed[1:], np.where(np.isnan(changed[-1:]), np.nan, 0.0)])
        difference = mean_interval(changed - behind, **{"clusters": clusters_of(chosen), **settings})
        for k, layer in enumerate(firsts.tolist()):
            ends = {end: float(getattr(difference, end)[k]) for end in ("value", "low", "high")}
            n = int(difference.n[k])
            rows.append({"layer": layer, "function": name, **ends, "n": n, "left_out": changed.shape[1] - n})
    return pd.DataFrame(rows)


def _changed(found: xr.Dataset) -> Float[np.ndarray, "swap example"]:
    """1 where an answer changed, NaN where it does not count; by the rule that the dataset holds, if any."""
    values = found["outcome"].transpose("swap", "example").to_numpy()
    if "changed" in found:
        rule = found["changed"].transpose("swap", "example").to_numpy()
        return np.where(np.isnan(values), np.nan, rule)
    return np.where(np.isnan(values), np.nan, values != OUTCOMES.index("unchanged"))


def _counted(found: xr.Dataset, among: str) -> xr.Dataset:
    if among not in AMONG:
        raise FrankenlensError(f"among={among!r} is none of {', '.join(AMONG)}")
    return found if among == "all" else found.assign(outcome=found["outcome"].where(found["differs"]))


def by_function(found: xr.Dataset, name: str) -> Iterator[tuple[str, xr.Dataset]]:
    """Each function's examples; "all" of them last, where there are several."""
    values = found[name].to_numpy()
    names = list(dict.fromkeys(values.tolist()))
    for one in names:
        yield one, found.isel(example=np.flatnonzero(values == one))
    if len(names) > 1:
        yield "all", found
