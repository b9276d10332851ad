"""Figures of a comparison: energy and directions along the network, spectra by region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from interp.comparison.aggregate import NORMS, RELATIVE, TRENDS, trends, types_of, with_regions
from interp.regions import Partition
from interp.results.palette import CONTROL, INK, MODELS, PALE, RANKS
from interp.results.picture import Picture, nothing

STAGES = {"in": "IN − Base", "rl": "RL − IN"}
_COLOURS = {stage: MODELS[stage] for stage in STAGES}
_NO_STAGE = "No tensor changed in any stage, so there is nothing to compare."
_ENERGY = (
    "Size of each layer's update ({norm}): IN − Base (blue) and RL − IN (red), each on a scale of its own; below "
    "both, relative to W_IN, on one logarithmic scale.{control} Behind the gap: what is in no block. Shaded: the "
    "regions of the decoder. Decoder layers count from 0; v0, v1, … are vision blocks."
)
_ROUNDING = " Dashes, dark: what rounding to bfloat16 alone would change."
_SPECTRA = (
    "How fast the singular values of an update fall, log(σ_i / σ_1): above, mean over the matrices of a region with "
    "its 95 % interval, IN − Base (blue) and RL − IN (red), beside Gaussian matrices of the same shapes (dashed); "
    "below, four ranks along the layers, mean over a layer's matrices. Decoder layers count from 0; v0, v1, … are "
    "vision blocks."
)
_DIRECTIONS = (
    "Along the layers, IN − Base (blue) and RL − IN (red): the share of bfloat16 values that did not change, the "
    "cosine of the two updates, their ranks, and the energy outside the principal subspace of W. Pale bars: a random "
    "update of the same norm and shapes. Shaded: the regions of the decoder. Decoder layers count from 0; v0, v1, … "
    "are vision blocks."
)
_NORMS: dict[str, str] = dict(
    zip(
        NORMS,
        (
            "norm of the layer's update",
            "mean norm of its matrices",
            "sum of its matrices' norms",
            "mean relative norm of its matrices",
            "mean relative norm (released code)",
        ),
        strict=True,
    )
)
_RANKS: dict[int, str] = dict(zip(TRENDS, RANKS, strict=True))
_CHANCE: dict[str, Any] = dict(color=CONTROL, linestyle="--", linewidth=1)


def plot_energy(layers: pd.DataFrame, partition: Partition, norm: str = "fro_norm") -> Picture:
    """Size of each layer's update along the unified index, each stage on a scale of its own, and relative to W_IN.

    Args:
        layers: what `interp.comparison.layers` returns.
        partition: its regions are shaded.
        norm: of `interp.comparison.aggregate.NORMS`.
    """
    stages = _stages(layers)
    if not stages:
        return nothing(_NO_STAGE)
    control = _ROUNDING if norm not in RELATIVE else ""
    caption = _ENERGY.format(norm=_NORMS[norm], control=control)
    figure = Picture(caption, figsize=(9, 2.6 * (len(stages) + 1)))
    relative = norm if norm in RELATIVE else "relative_norm"
    axes = np.atleast_1d(figure.subplots(len(stages) + 1, 1, sharex=True))
    for axis, stage in zip(axes, stages, strict=False):
        some, at = _along(layers, stage)
        axis.bar(at, some[norm], color=_COLOURS[stage], width=0.8)
        if norm == "fro_norm":  # the other norms have another scale
            _control(axis, at, some["rounding_norm"], "rounding to bfloat16")
        axis.set_ylabel(_NORMS[norm])
        axis.set_title(f"{STAGES[stage]}, own scale", fontsize=10)
        axis.set_ylim(0, 1.15 * (some[norm].max() or 1))
    for stage in stages:
        some, at = _along(layers, stage)
        _line(axes[-1], at, some[relative], stage)
    if norm not in RELATIVE:
        _control(axes[-1], at, some["rounding_norm"] / some["reference_norm"], "rounding to bfloat16")
    axes[-1].set_yscale("log")
    low, high = axes[-1].get_ylim()
    axes[-1].set_ylim(low / 3, high * 2.5)
    axes[-1].set_ylabel(_NORMS[norm] if norm in RELATIVE else "norm / norm of $W_{IN}$")
    axes[-1].set_title("relative", fontsize=10)
    for axis in axes:
        _regions(axis, layers, partition)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="best" if axis is not axes[-1] else "lower left", ncols=3)
    _name_layers(axes[-1], some, at)
    return figure


def plot_spectra(long: pd.DataFrame, partition: Partition) -> Picture:
    """log(σ_i / σ_1): mean over the matrices of a region, with its interval; below, four ranks along the layers.

    A layer has too few matrices for an interval of its own.

    Args:
        long: what `interp.comparison.spectra` returns.
        partition: of the decoder; vision and projector are beside its regions.
    """
    if long.empty:
        return nothing("No update has a matrix whose singular values differ from 0.")
    ranks = sorted(map(int, long["rank"].unique()))
    found = trends(with_regions(long, partition), ["region"], ranks)
    names = [name for name in (*partition.regions, "vision", "projector") if name in set(found["region"])]
    stages = _stages(long)
    figure = Picture(_SPECTRA, figsize=(max(9, 2.2 * len(names)), 7))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    above, below = parts
    axes = np.atleast_1d(above.subplots(1, len(names), sharey=True))
    for axis, name in zip(axes, names, strict=True):
        _spectrum(axis, found.loc[found["region"] == name], stages)
        axis.set_title(f"{name}, {_matrices(found, name)}", fontsize=10)
    axes[0].set_ylabel("$\\log(\\sigma_i / \\sigma_1)$")
    axes[0].legend(fontsize=7, loc="lower left")
    lower = np.atleast_1d(below.subplots(1, len(stages), sharey=True))
    inside: Any = long.loc[long["unified_index"].notna()]
    for axis, stage in zip(lower, stages, strict=True):
        _trend(axis, trends(inside[inside["stage"] == stage], ["unified_index"], TRENDS))
        axis.set_title(f"{STAGES[stage]}: mean over a layer's matrices", fontsize=10)
        _regions(axis, inside, partition)
        _ticks(axis, inside["unified_index"].dropna().astype(int).tolist(), 10)
        axis.set_xlabel(_along_label(inside))
    lower[0].set_ylabel("$\\log(\\sigma_i / \\sigma_1)$")
    lower[0].legend(fontsize=7, loc="lower left", ncols=2)
    return figure


def plot_directions(layers: pd.DataFrame, partition: Partition) -> Picture:
    """Along the layers: sparsity, cosine of the two stages' updates, ranks and energy outside W's principal subspace.

    Bars: what a random update of the same norm and shapes would give.

    Args:
        layers: what `interp.comparison.layers` returns; what it does not hold is not drawn.
        partition: its regions are shaded.
    """
    if not _stages(layers):
        return nothing(_NO_STAGE)
    panels = ["sparsity", *(["cosine"] if layers["cosine"].notna().any() else [])]
    panels += [name for name in ("stable_rank", "effective_rank", "energy_outside") if name in layers]
    rows = -(-len(panels) // 2)
    figure = Picture(_DIRECTIONS, figsize=(11, 2.7 * rows + 0.4))
    axes = np.atleast_1d(figure.subplots(rows, 2, sharex=True)).flatten()
    for axis, name in zip(axes, panels, strict=False):
        _PANELS[name](axis, layers)
        _regions(axis, layers, partition)
        axis.tick_params(labelbottom=True)
    for axis in axes[len(panels) :]:
        axis.remove()
    some, at = _along(layers, _stages(layers)[0])
    for axis in axes[: len(panels)]:
        _name_layers(axis, some, at, labelled=False)
    random = Line2D([], [], color=CONTROL, linewidth=2, alpha=0.6, label="random update of that norm")
    lines, _ = axes[0].get_legend_handles_labels()
    figure.legend(handles=[*lines, random], fontsize=8, loc="outside upper right", ncols=3)
    return figure


def _sparsity(axis: Axes, layers: pd.DataFrame) -> None:
    _both(axis, layers, "sparsity", "sparsity_random")
    axis.set_title(f"unchanged {types_of(layers)} values, share", fontsize=10)


def _cosine(axis: Axes, layers: pd.DataFrame) -> None:
    some, at = _along(layers, "rl")
    axis.plot(at, some["cosine"], "o", color=INK, markersize=3.5)
    chance = some["cosine_chance"].to_numpy(float)
    axis.vlines(at, -chance, chance, color=PALE, linewidth=4)
    axis.axhline(0, **_CHANCE)
    axis.set_title("cosine of the two updates; grey: 95 % of independent ones", fontsize=10)


def _stable(axis: Axes, layers: pd.DataFrame) -> None:
    _both(axis, layers, "stable_rank", "stable_rank_random")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title("stable rank, mean over matrices", fontsize=10)


def _effective(axis: Axes, layers: pd.DataFrame) -> None:
    _both(axis, layers, "effective_rank", "effective_rank_random")
    axis.set_title("effective rank, mean over matrices", fontsize=10)


def _outside(axis: Axes, layers: pd.DataFrame) -> None:
    _both(axis, layers, "energy_outside", "energy_outside_chance")
    axis.set_title("energy outside W's principal subspace, mean", fontsize=10)


_PANELS = {
    "sparsity": _sparsity,
    "cosine": _cosine,
    "stable_rank": _stable,
    "effective_rank": _effective,
    "energy_outside": _outside,
}


def _both(axis: Axes, layers: pd.DataFrame, name: str, control: str) -> None:
    for stage in _stages(layers):
        some, at = _along(layers, stage)
        _line(axis, at, some[name], stage)
        edges = np.array(at) - 0.4, np.array(at) + 0.4
        axis.hlines(some[control].astype(float), *edges, color=_COLOURS[stage], linewidth=2, alpha=0.45)


def _spectrum(axis: Axes, found: Any, stages: Sequence[str]) -> None:
    for stage in stages:
        some = found[found["stage"] == stage].sort_values("rank")
        axis.plot(some["rank"], some["log_ratio"], color=_COLOURS[stage], label=STAGES[stage])
        axis.fill_between(some["rank"], some["low"], some["high"], color=_COLOURS[stage], alpha=0.2)
    axis.plot(some["rank"], some["random"], label="Gaussian of these shapes", **_CHANCE)
    axis.set_xlabel("rank i")
    axis.set_xticks([1, *TRENDS, 50])


def _trend(axis: Axes, found: Any) -> None:
    for rank, some in found.groupby("rank"):
        at = some["unified_index"].astype(int)
        axis.plot(at, some["log_ratio"], "o-", color=_RANKS[rank], markersize=3, label=f"rank {rank}")


def _matrices(found: pd.DataFrame, region: str) -> str:
    n = int(found.loc[found["region"] == region, "n"].max())
    return f"n = {n}"


def _stages(table: pd.DataFrame) -> list[str]:
    return [stage for stage in STAGES if stage in set(table["stage"])]


def _along(layers: pd.DataFrame, stage: str) -> tuple[pd.DataFrame, list[int]]:
    """One stage's rows and their places: the unified index, and behind it what has none."""
    some: Any = layers.loc[layers["stage"] == stage].reset_index(drop=True)
    last = int(some["unified_index"].max())
    beyond = iter(range(last + 2, last + 2 + len(some)))
    return some, [next(beyond) if pd.isna(i) else int(i) for i in some["unified_index"]]


def _line(axis: Axes, at: Sequence[int], values: pd.Series, stage: str) -> None:
    """Joined within a tower, single points elsewhere."""
    places, found = np.array(at), values.to_numpy(float)
    end = np.flatnonzero(np.diff(places) > 1)
    inner = places <= (places[end[0]] if len(end) else places[-1])
    axis.plot(places[inner], found[inner], "o-", markersize=3.5, color=_COLOURS[stage], label=STAGES[stage])
    axis.plot(places[~inner], found[~inner], "o", markersize=3.5, color=_COLOURS[stage])


def _control(axis: Axes, at: Sequence[int], values: pd.Series, label: str) -> None:
    axis.hlines(values, np.array(at) - 0.4, np.array(at) + 0.4, color=INK, linewidth=1.5, label=label)


def _regions(axis: Axes, table: pd.DataFrame, partition: Partition) -> None:
    """Shades every other region and names them all."""
    spans = {name: (first - 0.5, last + 0.5) for name, (first, last) in partition.regions.items()}
    lowest = table["unified_index"].min()
    spans |= {"vision": (lowest - 0.5, -1.5)} if lowest < -1 else {}
    for i, (name, (left, right)) in enumerate(spans.items()):
        axis.axvspan(left, right, color=CONTROL, alpha=0.07 if i % 2 else 0.16, linewidth=0, zorder=0)
        where: dict[str, Any] = dict(
            transform=axis.get_xaxis_transform(), ha="center", va="top", fontsize=7, color=INK
        )
        axis.text((left + right) / 2, 0.98, name, **where)


def _name_layers(
    axis: Axes,
    some: pd.DataFrame,
    at: Sequence[int],
    labelled: bool = True,
) -> None:
    """A tick every few layers, and names where the unified index ends."""
    beyond = some["unified_index"].isna()
    inside = [i for i, outside in zip(at, beyond, strict=True) if not outside]
    names = {i: name for i, name, outside in zip(at, some["layer"], beyond, strict=True) if outside}
    ticks = _ticks(axis, inside, 14, names)
    for text in axis.get_xticklabels()[len(ticks) :]:
        text.set(rotation=45, ha="right", fontsize=7)
    if labelled:
        axis.set_xlabel(_along_label(some))


def _ticks(axis: Axes, places: Sequence[int], most: int, named: Mapping[int, str] | None = None) -> list[int]:
    """Places with a tick: layers and vision blocks from 0 on, every few of them, and the projector."""
    own = set(places)
    step = -(-len(own) // most)
    vision = sorted(place for place in own if place < -1)
    labels = {place: f"v{i}" for i, place in enumerate(vision) if i % step == 0}
    labels |= {-1: "p"} if -1 in own else {}
    labels |= {place: str(place) for place in sorted(own) if place >= 0 and place % step == 0}
    every = {**labels, **(named or {})}
    axis.set_xticks(list(every), list(every.values()))
    return list(labels)


def _along_label(table: pd.DataFrame) -> str:
    """What stands along the axis: vision and projector only where there are some."""
    vision = table["unified_index"].min() < 0
    return f"decoder layer (from 0{'; v: vision block, p: projector' if vision else ''})"
