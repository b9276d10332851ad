"""What freezing a component costs: retrained models on the same questions, against the one trained without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from hooks import FrankenlensError
from interp.results.palette import CONTROL, MIXED, PALE, PARTS, of_model
from interp.results.picture import Picture, nothing
from interp.statistics import (
    MIN_EXAMPLES,
    Interval,
    adjust,
    change_interval,
    difference_interval,
    mcnemar,
    mean_interval,
    mean_test,
    ratio_interval,
    share_interval,
)

Right = Float[np.ndarray, " question"]
UNFROZEN = "unfrozen"
IN = "IN"
COLOURS = {"region": MIXED, "random": CONTROL, "other": PARTS["mlp"], "rerun": PALE}
MARKS = {"region": "o", "random": "D", "other": "o", "rerun": "s"}
MEANING = {
    "region": "region",
    "random": "random layers (control)",
    "other": "other address",
    "rerun": "nothing frozen, another seed (control)",
}


@dataclass(frozen=True, eq=False)
class Retrained:
    """One training run, measured.

    Attributes:
        arm: its name; `UNFROZEN` where nothing was frozen.
        kind: "unfrozen", "region", "random", "other", or "rerun" (nothing frozen, another seed).
        seed: of the training.
        frozen: the addresses in words.
        n_frozen: frozen weights.
        right: 1 or 0 per question; NaN where it was left out.
        unreadable: share of replies without an answer that can be read (they count as wrong).
    """

    arm: str
    kind: str
    seed: int
    frozen: str
    n_frozen: int
    right: Float[np.ndarray, " question"]
    unreadable: float


def losses(
    runs: Sequence[Retrained],
    in_right: Float[np.ndarray, " question"],
    groups: Mapping[str, Sequence[int]],
    clusters: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Accuracy of every run, and what it lost against the unfrozen run of the same seed, paired by question.

    With several seeds, rows with the seed "mean" pool them: a question's value is its mean over the seeds.

    Args:
        runs: every seed needs its `UNFROZEN` run.
        in_right: IN on the same questions.
        groups: name of a group of questions to their places.
        clusters: of the questions (`interp.questions.examples.cluster_of`); None: each stands alone.

    Returns:
        One row per arm, seed and group: arm, kind, rl_seed, frozen, n_frozen, group, n, accuracy, low, high (Wilson; of
        the mean over seeds: `mean_interval`), change, change_low, change_high (arm - unfrozen, over questions),
        gained, lost, p (McNemar, exact; of the mean over seeds: `mean_test`), p_holm (over one seed's arms and groups),
        share, share_low, share_high (of unfrozen - IN, what is lost: 1 is all of it; empty where the interval of
        unfrozen - IN includes 0), unreadable.

    Raises:
        FrankenlensError: a seed without its unfrozen run.
    """
    seeds = sorted({run.seed for run in runs})
    by_seed: dict[Any, dict[str, Retrained]] = {s: {r.arm: r for r in runs if r.seed == s} for s in seeds}
    for seed, arms in by_seed.items():
        if UNFROZEN not in arms:
            raise FrankenlensError(f"seed {seed} has no run without freezing to compare with")
    if len(seeds) > 1:
        by_seed["mean"] = {arm: _mean([r for r in runs if r.arm == arm]) for arm in by_seed[seeds[0]]}
    tables = []
    for seed, arms in by_seed.items():
        rows = []
        for arm in (Retrained(IN, "in", 0, "", 0, in_right, np.nan), *arms.values()):
            for group, places in groups.items():
                at = np.asarray(places)
                own, whole, start = (x[at] for x in (arm.right, arms[UNFROZEN].right, in_right))
                row = _compared(arm, own, whole, start, None if clusters is None else np.array(clusters)[at])
                rows.append({"arm": arm.arm, "kind": arm.kind, "rl_seed": seed, "group": group} | row)
        table = pd.DataFrame(rows)
        tested = ~table["kind"].isin(["in", "unfrozen"])
        table["p_holm"] = np.nan
        table.loc[tested, "p_holm"] = adjust(table.loc[tested, "p"].to_numpy(float))
        tables.append(table)
    front = ["arm", "kind", "rl_seed", "frozen", "n_frozen", "group", "n", "accuracy", "low", "high"]
    front += ["change", "change_low", "change_high", "gained", "lost", "p", "p_holm"]
    table = pd.concat(tables, ignore_index=True)
    return table.reindex(columns=front + [column for column in table if column not in front])


_CAPTION = (
    "Accuracy after RL with a component frozen, with its 95 % interval (Wilson's; a mean over seeds has none where "
    "questions are few); a panel a group of questions. Lines with bands: IN, where RL began (blue, dashed), and RL "
    "with nothing frozen (red). Grey: the controls, random layers frozen, and nothing frozen with another seed."
)


def task_table(runs: Sequence[Retrained], models: Mapping[str, Right], tasks: Sequence[str]) -> pd.DataFrame:
    """Accuracy of every model on every task.

    Args:
        runs: what was trained.
        models: further models, by name, on the same questions; they come first.
        tasks: of the questions; "" where there is only one.

    Returns:
        Columns model, rl_seed ("" of a model that was not trained here), and one per task.
    """
    of, every = np.array(tasks), [(name, "", right) for name, right in models.items()]
    every += [(run.arm, str(run.seed), run.right) for run in runs]
    rows = []
    for name, seed, right in every:
        accuracy = {
            task or "questions": float(np.nanmean(right[of == task])) for task in dict.fromkeys(tasks)
        }
        rows.append({"model": name, "rl_seed": seed} | accuracy)
    return pd.DataFrame(rows)


def plot_losses(table: pd.DataFrame) -> Picture:
    """Accuracy of every arm per group of questions, between lines at IN and at the unfrozen run.

    With several seeds, the rows of their mean.
    """
    if table.empty or table["kind"].isin(["in", "unfrozen"]).all():
        return nothing("Nothing was frozen in any run.")
    seed = "mean" if (table["rl_seed"] == "mean").any() else table["rl_seed"].iloc[0]
    table = table.loc[table["rl_seed"] == seed]
    groups = table["group"].drop_duplicates().tolist()
    arms = table.loc[~table["kind"].isin(["in", "unfrozen"]), "arm"].drop_duplicates().tolist()[::-1]
    height = 1.9 + 0.32 * len(arms)
    figure = Picture(_CAPTION, figsize=(1.6 + 3.4 * len(groups), height))
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for ax, group in zip(axes, groups, strict=True):
        here = table[table["group"] == group].set_index("arm")
        for name, colour, style in ((IN, of_model("in"), "--"), (UNFROZEN, of_model("rl"), "-")):
            row = here.loc[name]
            ax.axvspan(100 * row["low"], 100 * row["high"], color=colour, alpha=0.1, lw=0)
            label = f"{'RL, nothing frozen' if name == UNFROZEN else name}, 95 %"
            ax.axvline(100 * row["accuracy"], color=colour, ls=style, lw=1, label=label)
        for kind in [kind for kind in MEANING if (here["kind"] == kind).any()]:
            some = here[here["kind"] == kind]
            value = 100 * some["accuracy"]
            ends = np.stack([value - 100 * some["low"], 100 * some["high"] - value])
            y = [arms.index(name) for name in some.index]
            how = {"fmt": MARKS[kind], "color": COLOURS[kind], "label": MEANING[kind]}
            ax.errorbar(value, y, xerr=ends, ms=4, lw=1.2, **how)
        ax.set(title=group, xlabel="accuracy, %", ylim=(-0.6, len(arms) - 0.4))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylabel("frozen while RL trains")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    return figure


def _compared(
    arm: Retrained,
    own: Float[np.ndarray, " n"],
    whole: Float[np.ndarray, " n"],
    start: Float[np.ndarray, " n"],
    clusters: Shaped[np.ndarray, " n"] | None,
) -> dict[str, Any]:
    there = ~(np.isnan(own) | np.isnan(whole) | np.isnan(start))
    own, whole, start = own[there], whole[there], start[there]
    n, of = int(there.sum()), None if clusters is None else clusters[there]
    binary = bool(np.isin(np.concatenate([own, whole]), (0, 1)).all())
    accuracy = share_interval(own, of) if binary else mean_interval(own, clusters=of)
    row: dict[str, Any] = {"frozen": arm.frozen, "n_frozen": arm.n_frozen, "n": n}
    row |= _columns("", accuracy, "accuracy") | {
        "change": np.nan,
        "change_low": np.nan,
        "change_high": np.nan,
    }
    row |= {"gained": np.nan, "lost": np.nan, "p": np.nan, "share": np.nan}
    row |= {"share_low": np.nan, "share_high": np.nan, "unreadable": arm.unreadable}
    if arm.kind == "unfrozen":
        return row
    change = change_interval(own, whole, of) if binary else difference_interval(own, whole, clusters=of)
    row |= _columns("change_", change, "change")
    if binary:
        found = mcnemar(own, whole, of)
        row |= {"gained": found.gained, "lost": found.lost, "p": found.p}
    else:
        row["p"] = float(mean_test(own - whole, clusters=of))
    gain = difference_interval(whole, start, clusters=of, fewest=MIN_EXAMPLES)
    if arm.kind != "in" and float(gain.low) > 0:
        row |= _columns("share_", ratio_interval(whole - own, whole - start, clusters=of), "share")
    return row


def _columns(prefix: str, interval: Interval, name: str) -> dict[str, float]:
    ends = {f"{prefix}low": float(interval.low), f"{prefix}high": float(interval.high)}
    return {name: float(interval.value)} | ends


def _mean(runs: Sequence[Retrained]) -> Retrained:
    """The runs of one arm with several seeds as one; random layers differ between them in nothing but training."""
    first = runs[0]
    right = np.mean([run.right for run in runs], axis=0)
    unreadable = float(np.mean([run.unreadable for run in runs]))
    return Retrained(first.arm, first.kind, -1, first.frozen, first.n_frozen, right, unreadable)
