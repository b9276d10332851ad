"""What each method can and cannot find: AUROC, precision, ranks, and claims where there is nothing to find."""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import mannwhitneyu

from hooks.errors import FrankenlensError
from interp.statistics import mean_interval, wilson_interval

ALPHA = 0.05
NOISE_QUANTILE = 0.95
FOUND = (
    *(
        "kind",
        "method",
        "n_pairs",
        "n_changed",
        "n_invisible",
        "in_reach",
        "auroc",
        "auroc_low",
        "auroc_high",
    ),
    *("precision", "precision_low", "precision_high", "auroc_visible", "rank", "found_tested", "found"),
    "refused",
)
HELD = ("norm_ratio", "cosine", "noise_ratio")
"""What the weights of a pair hold of its plant and its noise."""
NULL = ("kind", "method", "n_pairs", "tested", "claimed", "claimed_low", "claimed_high")
Scores = Float[np.ndarray, " component"]
Truth = Bool[np.ndarray, " component"]


def auroc(scores: Scores, changed: Truth) -> float:
    """Share of (changed, unchanged) couples in which the changed component scores higher; ties count half.

    A component of which a method says nothing (NaN) scores lowest. NaN where there are not both kinds.
    """
    if changed.all() or not changed.any():
        return float("nan")
    known = _lowest(scores)
    couples = int(changed.sum()) * int((~changed).sum())
    return float(mannwhitneyu(known[changed], known[~changed]).statistic) / couples


def precision_at(scores: Scores, changed: Truth) -> float:
    """Share of changed components among the k strongest, k being their number; what ties leave open, on average."""
    known, k = _lowest(scores), int(changed.sum())
    if not k:
        return float("nan")
    at = np.sort(known)[-k]
    above, level = known > at, known == at
    left = k - int(above.sum())
    return float(changed[above].sum() + left * changed[level].mean()) / k


def ranks(scores: Scores, changed: Truth) -> Float[np.ndarray, " changed"]:
    """Of each changed component among the unchanged ones: 1 where none of them scores as high; ties count half."""
    known = _lowest(scores)
    own, others = known[changed][:, None], known[~changed][None]
    return 1 + (others > own).sum(1) + 0.5 * (others == own).sum(1)


def invisible(plants: pd.DataFrame) -> pd.Series:
    """Which planted components move the output no more than noise pairs do.

    Args:
        plants: a row per pair and planted component, and one per noise pair (component ""): columns pair, component,
            effect (`interp.planting.effect_of_plant`, tokens).

    Returns:
        Whether the effect lies below the 95th percentile of those of the noise pairs; False for these.

    Raises:
        FrankenlensError: there is no noise pair.
    """
    noise = plants.loc[plants["component"] == "", "effect"]
    if noise.empty:
        raise FrankenlensError("no noise pair stands beside the plants; visibility is measured against them")
    return (plants["component"] != "") & (plants["effect"] <= noise.quantile(NOISE_QUANTILE))


def by_pair(scores: pd.DataFrame, plants: pd.DataFrame) -> pd.DataFrame:
    """One row per pair and method.

    Args:
        scores: rows of `interp.planting.trial`, with columns pair and kind.
        plants: as in `invisible`.

    Returns:
        pair, kind, method, auroc, auroc_visible (invisible plants left out of both sides), precision, rank (median of
        the changed ones), n_changed, n_in_reach (of these, about which the method says something), n_visible, tested
        (whether the method has p values), claims (components with a corrected p below 0.05), claims_kept (0 where
        recoveries are refused; equal to claims for methods that move nothing), found_tested and found (visible changed
        components among claims and claims_kept), refused; norm_ratio, cosine and noise_ratio, as in `trial`.
    """
    unseen = set(map(tuple, plants.loc[invisible(plants), ["pair", "component"]].to_numpy()))
    rows = []
    for key, group in scores.groupby(["pair", "kind", "method"], sort=False):
        pair, kind, method = cast("tuple[str, str, str]", key)
        changed = group["changed"].to_numpy(bool)
        hidden = np.array([(pair, name) in unseen for name in group["component"]])
        values = group["score"].to_numpy(float)
        claimed = group["p_corrected"].to_numpy(float) < ALPHA
        refused = bool((group["refused"] != "").any())
        kept = claimed & (not refused)
        rows.append(
            {
                "pair": pair,
                "kind": kind,
                "method": method,
                "auroc": auroc(values, changed),
                "auroc_visible": auroc(values[~hidden], changed[~hidden]),
                "precision": precision_at(values, changed),
                "rank": float(np.median(ranks(values, changed))) if changed.any() else np.nan,
                "n_changed": int(changed.sum()),
                "n_in_reach": int((changed & ~np.isnan(values)).sum()),
                "n_visible": int((changed & ~hidden).sum()),
                "tested": bool(group["p"].notna().any()),
                "claims": int(claimed.sum()),
                "claims_kept": int(kept.sum()),
                "found_tested": int((claimed & changed & ~hidden).sum()),
                "found": int((kept & changed & ~hidden).sum()),
                "refused": refused,
                **{name: float(group[name].iloc[0]) for name in HELD},
            }
        )
    return pd.DataFrame(rows)


def found_table(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row per kind and method over the pairs with a plant; intervals (95 %) are over pairs.

    Columns: n_pairs, n_changed, n_invisible, in_reach (share of the changed components about which the method says
    something), auroc and precision with _low and _high, auroc_visible (over the pairs that have both kinds), rank
    (median over pairs), found_tested (share of visible changed components with a corrected p below 0.05) and found
    (of these, those whose recoveries are not refused), NaN where nothing is tested, refused (share of pairs).
    """
    some = pairs.loc[pairs["n_changed"] > 0]
    rows = []
    for key, group in some.groupby(["kind", "method"], sort=False):
        kind, method = cast("tuple[str, str]", key)
        row = {"kind": kind, "method": method, "n_pairs": len(group), "n_changed": group["n_changed"].sum()}
        row["n_invisible"] = row["n_changed"] - group["n_visible"].sum()
        row["in_reach"] = group["n_in_reach"].sum() / row["n_changed"]
        for name in ("auroc", "precision"):
            interval = mean_interval(group[name].to_numpy())
            row |= {name: float(interval.value), f"{name}_low": float(interval.low)}
            row |= {f"{name}_high": float(interval.high)}
        row["auroc_visible"] = group["auroc_visible"].mean()
        row["rank"] = group["rank"].median()
        visible = int(group["n_visible"].sum())
        for name in ("found_tested", "found"):
            row[name] = group[name].sum() / visible if visible and group["tested"].any() else np.nan
        row["refused"] = group["refused"].mean()
        rows.append(row)
    return pd.DataFrame(rows, columns=list(FOUND))


def null_table(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row per kind and method over the pairs without a plant.

    Columns: n_pairs; tested, the pairs in which at least one component has a corrected p below 0.05, and claimed, those
    of them whose recoveries are not refused; with claimed_low and claimed_high (Wilson, 95 %). NaN for methods that
    test nothing.
    """
    none = pairs.loc[pairs["n_changed"] == 0]
    rows = []
    for key, group in none.groupby(["kind", "method"], sort=False):
        kind, method = cast("tuple[str, str]", key)
        n, able = len(group), bool(group["tested"].any())
        row: dict[str, object] = {"kind": kind, "method": method, "n_pairs": n}
        for name, column in (("tested", "claims"), ("claimed", "claims_kept")):
            row[name] = float((group[column] > 0).mean()) if able else np.nan
        interval = wilson_interval(int((group["claims_kept"] > 0).sum()), n)
        row["claimed_low"] = float(interval.low) if able else np.nan
        row["claimed_high"] = float(interval.high) if able else np.nan
        rows.append(row)
    return pd.DataFrame(rows, columns=list(NULL))


def by_effect(scores: pd.DataFrame, plants: pd.DataFrame) -> pd.DataFrame:
    """Every planted component alone: its effect in multiples of the noise pairs' 95th percentile, and the share of
    unchanged components of its pair that it outranks (its own AUROC), by method.

    Returns:
        Columns pair, kind, method, component, times_noise, auroc, in_reach (whether the method says something of it).

    Raises:
        FrankenlensError: the noise pairs do not move the output at all.
    """
    limit = plants.loc[plants["component"] == "", "effect"].quantile(NOISE_QUANTILE)
    if not limit > 0:
        raise FrankenlensError(
            f"the noise pairs' 95th percentile is {limit}; nothing can be measured against it"
        )
    effects = plants.set_index(["pair", "component"])["effect"] / limit
    rows = []
    for key, group in scores.groupby(["pair", "kind", "method"], sort=False):
        pair, kind, method = cast("tuple[str, str, str]", key)
        changed = group["changed"].to_numpy(bool)
        if not changed.any() or changed.all():
            continue
        n = int((~changed).sum())
        own, names = group["score"].to_numpy(float), group.loc[changed, "component"]
        share = 1 - (ranks(own, changed) - 1) / n
        for name, value, score in zip(names, share, own[changed], strict=True):
            times = float(effects.loc[pair, name])
            rows.append((pair, kind, method, name, times, float(value), not np.isnan(score)))
    columns = ["pair", "kind", "method", "component", "times_noise", "auroc", "in_reach"]
    return pd.DataFrame(rows, columns=columns)


def _lowest(scores: Scores) -> Scores:
    return np.where(np.isnan(scores), -np.inf, scores)
