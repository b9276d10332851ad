"""Figures of functional localization: what a swap does along the layers, and what the model is worth without them."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from interp.regions import Partition
from interp.results.palette import CONTROL, EFFECT, INK, MISSING, MIXED, OUTCOMES, PALE, PARTS
from interp.results.picture import LAYER, Picture, along_layers, nothing

CONTRIBUTION = "CR(k) − CR(k+1)"
"""The outcome of a row that holds what `layer_contributions` returns."""
_LINES = {
    "source": ("-", "takes the source's answer"),
    "broke": ("-", "breaks"),
    "unchanged": (":", "keeps its own answer"),
}
_SWAPS = (
    "What becomes of the answer when some layers see the source's image: the share of pairs that take the source's "
    "answer, break or keep their own, by the (first) layer of the swap, with Wilson's 95 % intervals; a column a "
    "function, a row a way of swapping. Crosses, grey: the control, an image with the same answer, on which the answer "
    "should stay. Bars: what a layer adds to the change rate, CR(k) − CR(k+1), with its paired interval. Shaded: the "
    "regions of the decoder. Layers count from 0."
)
_ABLATIONS = (
    "Accuracy without one layer's block, attention or MLP, with Wilson's 95 % intervals; a column a function, a row a "
    "kind of ablation. Dashed, with its band: the model as it is. Filled: differs from it, p corrected below 0.05. "
    "Shaded: the regions of the decoder. Layers count from 0."
)
_HEADS = (
    "Change of accuracy without one {part} (orange: less accurate), a column a function, a row a kind of ablation. "
    "Pale and struck through: not told from 0 after correction. Layers and {part}s count from 0."
)
_PART_NAMES = {"block": "block", "attn": "attention", "mlp": "MLP"}
ALPHA = 0.05


def plot_swaps(table: pd.DataFrame, partition: Partition) -> Picture:
    """Share of each outcome by the first layer of the swap: a column per function, a row per way of swapping.

    Args:
        table: `interp.localization.outcome_shares` with columns `mode` and `pairs` ("counterfactual", or the name of a
            control); `CONTRIBUTION` rows get a line of their own.
        partition: its regions are shaded.
    """
    if table.empty:
        return nothing("No pair of images was swapped.")
    functions = _names(table["function"], but="all")
    modes = [(mode, False) for mode in _names(table["mode"])]
    modes += [(mode, True) for mode in _names(table.loc[table["outcome"] == CONTRIBUTION, "mode"])]
    figure, grid = _grid(_SWAPS, len(modes), len(functions))
    for row, (mode, parts) in zip(grid, modes, strict=True):
        for axes, function in zip(row, functions, strict=True):
            some = table.loc[(table["mode"] == mode) & (table["function"] == function)]
            own = some.loc[some["pairs"] == "counterfactual"]
            shade_regions(axes, partition)
            if parts:
                _bars(axes, own.loc[own["outcome"] == CONTRIBUTION])
            else:
                _swap_lines(axes, own, some)
            n = own.loc[own["outcome"] == "changed", "n"]
            axes.set_title(f"{function}  (n = {_span(n)})", fontsize=9)
            label = LAYER if mode == "single" else f"first layer k of the {mode} (from 0)"
            along_layers(axes, [last for _, last in partition.regions.values()], label)
        row[0].set_ylabel(f"{mode}: {CONTRIBUTION}" if parts else f"{mode}: share of pairs", fontsize=8)
    _legend(figure, grid[0][0])
    return figure


def plot_ablations(table: pd.DataFrame, partition: Partition) -> Picture:
    """Accuracy without a block, its attention or its MLP: a column per function, a row per kind of ablation.

    Filled: differs from the whole model after correction. Dashed, with its interval: the whole model.

    Args:
        table: what `interp.localization.accuracy` returns; heads are drawn by `plot_head_ablations`.
        partition: its regions are shaded.
    """
    table = table.loc[~table["part"].isin(["head", "expert"])]
    if table.empty:
        return nothing("No block, attention or MLP was ablated.")
    functions, kinds = _names(table["function"], but="all"), _names(table["kind"])
    figure, grid = _grid(_ABLATIONS, len(kinds), len(functions))
    for row, kind in zip(grid, kinds, strict=True):
        for axes, function in zip(row, functions, strict=True):
            some = table.loc[(table["kind"] == kind) & (table["function"] == function)]
            shade_regions(axes, partition)
            whole = some.iloc[0]
            axes.axhspan(whole["whole_low"], whole["whole_high"], color=CONTROL, alpha=0.25, linewidth=0)
            axes.axhline(whole["whole"], color=INK, linestyle="--", linewidth=1, label="whole model")
            axes.plot(
                [], [], "o", color=INK, markersize=4, label=f"differs from it (p < {ALPHA} after correction)"
            )
            for part, own in some.groupby("part", sort=False):
                _curve(axes, own.sort_values("layer"), PARTS[str(part)], _PART_NAMES[str(part)])
            axes.set_ylim(-0.03, 1.14)
            axes.set_title(f"{function}  (n = {_span(some['n'])})", fontsize=9)
            along_layers(axes, [last for _, last in partition.regions.values()])
        row[0].set_ylabel(f"accuracy, {kind}", fontsize=8)
    _legend(figure, grid[0][0])
    return figure


def plot_head_ablations(table: pd.DataFrame, part: str = "head") -> Picture:
    """Change of accuracy without a head (or expert), layer by head; pale: not told from 0 after correction.

    Args:
        table: what `interp.localization.accuracy` returns, with that part.
        part: "head" or "expert".
    """
    table = table.loc[table["part"] == part]
    if table.empty:
        return nothing(f"No {part} was ablated.")
    functions, kinds = _names(table["function"], but="all"), _names(table["kind"])
    figure, grid = _grid(_HEADS.format(part=part), len(kinds), len(functions), height=2.8, sharey=False)
    reach = float(np.nanmax([0.05, table["change"].abs().max()]))
    norm = Normalize(-reach, reach)
    for row, kind in zip(grid, kinds, strict=True):
        for axes, function in zip(row, functions, strict=True):
            some = table.loc[(table["kind"] == kind) & (table["function"] == function)]
            value, p = (
                some.pivot(index="layer", columns="head", values=name) for name in ("change", "p_corrected")
            )
            draw_heads(axes, value.to_numpy(), p.to_numpy() < ALPHA, norm)
            axes.set_xlabel(f"{part} (from 0)", fontsize=8)
            axes.set_title(f"{function}  (n = {_span(some['n'])})", fontsize=9)
        row[0].set_ylabel(f"{kind}: {LAYER}", fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm, EFFECT), ax=list(np.ravel(np.array(grid))), shrink=0.8)
    bar.set_label("change of accuracy", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_heads(
    axes: Axes, value: np.ndarray, sure: np.ndarray, norm: Normalize, colours: str = EFFECT
) -> None:
    """A layer by head map on a diverging scale; cells that are not `sure` are pale and struck through."""
    shown = matplotlib.colormaps[colours](norm(np.nan_to_num(value)))
    shown = np.where(sure[..., None], shown, 0.3 * shown + 0.7)
    shown[..., 3] = ~np.isnan(value)
    axes.set_facecolor(MISSING)
    axes.imshow(shown, origin="lower", aspect="auto", interpolation="nearest")
    for layer, head in np.argwhere(~sure & ~np.isnan(value)):
        axes.plot(
            [head - 0.5, head + 0.5], [layer - 0.5, layer + 0.5], color="0.75", linewidth=0.4, solid_capstyle="butt"
        )  # fmt: skip
    for ticks, size in ((axes.set_yticks, value.shape[0]), (axes.set_xticks, value.shape[1])):
        places = range(0, size, -(-size // 14))
        ticks(places, [str(place) for place in places], fontsize=7)
    axes.set_xlabel("head (from 0)", fontsize=8)


def shade_regions(axes: Axes, partition: Partition) -> None:
    """The regions of the decoder along the x axis, every second one shaded, named at the top."""
    for i, (name, (first, last)) in enumerate(partition.regions.items()):
        if i % 2 == 0:
            axes.axvspan(first - 0.5, last + 0.5, color="0.94", zorder=0, linewidth=0)
        middle = (first + last) / 2
        axes.annotate(
            name, (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, -2), textcoords="offset points",
            ha="center", va="top", fontsize=6, color="0.55",
        )  # fmt: skip


def _swap_lines(axes: Axes, own: pd.DataFrame, with_controls: pd.DataFrame) -> None:
    for outcome, (style, label) in _LINES.items():
        colour = OUTCOMES[outcome]
        some = own.loc[own["outcome"] == outcome].sort_values("first")
        axes.fill_between(some["first"], some["low"], some["high"], color=colour, alpha=0.15, linewidth=0)
        axes.plot(some["first"], some["value"], style, color=colour, marker="o", markersize=3, label=label)
    control = with_controls.loc[
        (with_controls["pairs"] == "same answer") & (with_controls["outcome"] == "changed")
    ].sort_values("first")
    if len(control):
        ends = control["value"] - control["low"], control["high"] - control["value"]
        axes.errorbar(
            control["first"] + 0.15, control["value"], yerr=np.abs(np.stack(ends)), fmt="x", color=CONTROL,
            markersize=4, linewidth=0.8, label="control, image with the same answer: changed",
        )  # fmt: skip
    axes.set_ylim(-0.03, 1.14)


def _bars(axes: Axes, some: pd.DataFrame) -> None:
    reach = np.abs(np.stack([some["value"] - some["low"], some["high"] - some["value"]]))
    axes.axhline(0, color=PALE, linewidth=0.8)
    axes.bar(some["first"], some["value"], color=MIXED, alpha=0.6, width=0.7)
    axes.errorbar(some["first"], some["value"], yerr=np.nan_to_num(reach), fmt="none", color=INK, linewidth=1)


def _curve(axes: Axes, own: pd.DataFrame, colour: str, label: str) -> None:
    axes.fill_between(own["layer"], own["low"], own["high"], color=colour, alpha=0.15, linewidth=0)
    axes.plot(own["layer"], own["accuracy"], color=colour, linewidth=1.2)
    sure = own["p_corrected"] < ALPHA
    for chosen, face in ((sure, colour), (~sure, "white")):
        axes.plot(
            own.loc[chosen, "layer"], own.loc[chosen, "accuracy"], "o", color=colour, markerfacecolor=face,
            markersize=4,
        )  # fmt: skip
    axes.plot([], [], "-", color=colour, label=label)


def _grid(
    caption: str, rows: int, columns: int, height: float = 2.2, sharey: bool = True
) -> tuple[Picture, Sequence[Sequence[Axes]]]:
    figure = Picture(caption, figsize=(max(6.0, 2.4 * columns + 0.6), height * rows + 0.7))
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row" if sharey else False)
    for axes in grid.ravel():
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, [list(row) for row in grid]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=7, frameon=False)


def _names(column: pd.Series, but: str | None = None) -> list[str]:
    found = [str(name) for name in dict.fromkeys(column)]
    return [name for name in found if name != but] or found


def _span(n: pd.Series) -> str:
    low, high = int(n.min()), int(n.max())
    return str(low) if low == high else f"{low}-{high}"
