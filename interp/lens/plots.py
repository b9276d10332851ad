"""Figures of lenses: what each layer says at each token and over the image, and how far IN and RL are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure
from PIL import Image

from hooks import FrankenlensError
from interp.lens.image_grid import image_grids
from interp.prompts import Prompt
from interp.results.palette import CONTROL, DIFFERENCE, INK, MODELS, NULLS, SHARE, of_model
from interp.results.picture import LAYER, Picture, along_layers, nothing

READ = "read before layer (from 0)"
"""Where a lens reads the stream: before that block runs; the last place is behind the last block."""
_TOKENS = (
    "What the {lens} says before each layer of one prompt: the token that would come next, darker where it is "
    "likelier; a panel a model. Across: the tokens that are read, with their positions. Layers count from 0; the top "
    "row is behind the last one."
)
_IMAGE = (
    "What the {lens} says at each visual token, written where the token lies in the image, darker where it is "
    "likelier; a column a layer that it is read before (from 0; the last column: behind the last layer), a row a model "
    "and tile."
)
_APART = (
    "How far apart what IN and RL say at the same tokens is, by the layer before which it is read: above the KL "
    "divergence, below the share of the likeliest tokens in common, means over prompts with 95 % intervals; a panel a "
    "role. Dashed, grey: models that learnt nothing. Layers count from 0; the last place is behind the last one."
)
_OWN = (
    "How far the prediction before each layer is from the model's own output (KL, mean over prompts with 95 % "
    "intervals): IN blue, RL red; a panel a role. Dotted: a tuned lens. Layers count from 0; the last place is behind "
    "the last one, where the logit lens is the output itself."
)
_ANSWERS = (
    "Share of prompts whose answer has been the likeliest token once, and of those where it stays so, by the layer "
    "before which it is read: IN blue, RL red. Layers count from 0; the last place is behind the last one."
)
_ATTRIBUTION = (
    "What every component writes towards RL's token and away from IN's at the token where they part, in logits: mean "
    "in IN, in RL, and RL − IN (red: towards RL's token, blue: towards IN's; the colours grow with the square root). A "
    "dot: the difference is told from 0, p corrected below 0.05. Layers and heads count from 0."
)
_COLOURS = SHARE
_UNIT = Normalize(0, 1)
_LETTERS = 9  # of a token in a cell


def plot_tokens(lens: xr.Dataset, row: int = 0, last: int = 24) -> Picture:
    """What each layer says at each token of one prompt: the likeliest next token, shaded by its probability.

    Args:
        lens: what `logit_lens` returns; with two models, one panel each.
        row: which prompt.
        last: at most so many of its tokens, the last ones.

    Raises:
        FrankenlensError: the lens has no token of that prompt.
    """
    some = lens.isel(token=lens["row"].to_numpy() == row)
    if not some.sizes["token"]:
        raise FrankenlensError(f"the lens holds no token of prompt {row}; it has rows {_rows(lens)}.")
    some = some.isel(token=slice(-last, None))
    panels = _by_model(some)
    n, layers = some.sizes["token"], some.sizes["layer"]
    size = (1.6 + 0.62 * n, len(panels) * (1.2 + 0.23 * layers))
    figure = Picture(_TOKENS.format(lens=lens.attrs["lens"]), figsize=size)
    axes = np.atleast_1d(figure.subplots(len(panels), 1))
    for axis, (name, one) in zip(axes, panels.items(), strict=True):
        best = one.isel(rank=0)
        _word_grid(axis, best["word"].to_numpy(), best["probability"].to_numpy(), 6.5)
        axis.set_yticks(range(layers), [str(layer) for layer in one["layer"].to_numpy()], fontsize=7)
        labels = [
            f"{_shown(t)}  {p}" for t, p in zip(one["text"].values, one["position"].values, strict=True)
        ]
        axis.set_xticks(range(n), labels, fontsize=7, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_ylabel(READ, fontsize=8)
        axis.set_title(
            _title(name, f"{lens.attrs['lens']}, {one['example'].values[0]}"), fontsize=9, loc="left"
        )
    axes[-1].set_xlabel("token that is read, and its position; in the cells what would come next", fontsize=8)
    _bar(figure, axes, "probability")
    return figure


def plot_image(
    lens: xr.Dataset, prompt: Prompt, row: int = 0, layers: Sequence[int] | None = None
) -> Picture:
    """What each visual token says, drawn where it lies in the image, layer by layer (rows: models and tiles).

    Args:
        lens: what `logit_lens(..., where="image")` (or "all") returns.
        prompt: the prompt of that row.
        row: which prompt of the lens.
        layers: at most a handful; None: five, spread evenly.

    Raises:
        FrankenlensError: the lens lacks an image token of the prompt or a layer; or the grid is not known.
    """
    held = lens["layer"].to_numpy().tolist()
    chosen = held if layers is None else list(layers)
    if missing := [layer for layer in chosen if layer not in held]:
        raise FrankenlensError(f"the lens has no layer {missing[0]}; it holds {held}.")
    if layers is None and len(held) > 5:
        chosen = [held[round(at)] for at in np.linspace(0, len(held) - 1, 5)]
    some = lens.isel(token=lens["row"].to_numpy() == row)
    where = {int(position): at for at, position in enumerate(some["position"].to_numpy())}
    grids = image_grids(prompt)
    absent = [int(p) for grid in grids for p in grid.positions.ravel() if int(p) not in where]
    if absent:
        raise FrankenlensError(f"the lens lacks image token {absent[0]} of prompt {row}; use where='image'.")
    lines = [(name, one, grid) for name, one in _by_model(some).items() for grid in grids]
    widest = max(grid.positions.shape[1] for grid in grids)
    side = max(2.0, 0.5 * widest)
    size = (side * len(chosen) + 0.8, (side + 0.2) * len(lines))
    figure = Picture(_IMAGE.format(lens=lens.attrs["lens"]), figsize=size)
    axes = figure.subplots(len(lines), len(chosen), squeeze=False)
    for line, (name, one, grid) in zip(axes, lines, strict=True):
        picture = _cut(prompt.example.images[grid.image], grid.box)
        index = np.vectorize(where.__getitem__)(grid.positions)
        for axis, layer in zip(line, chosen, strict=True):
            best = one.sel(layer=layer).isel(rank=0)
            cells = best["word"].to_numpy()[index], best["probability"].to_numpy()[index]
            _over_image(axis, picture, *cells)
            axis.set_title(f"before layer {layer}", fontsize=8)
        tile = f"\ntile {grid.tile[0]}, {grid.tile[1]}" if grid.tile else ""
        line[0].set_ylabel(_title(name, f"image {grid.image + 1}") + tile, fontsize=8)
    _bar(figure, axes, "probability")
    return figure


def plot_apart(table: pd.DataFrame) -> Picture:
    """KL(RL || IN) and overlap of the likeliest tokens by layer, a panel a role, beside models that learnt nothing.

    Args:
        table: columns comparison, role, layer, kl, kl_low, kl_high, overlap, overlap_low, overlap_high, n, top_k.
    """
    if table.empty:
        return nothing("No token was read in both models.")
    roles = list(dict.fromkeys(table["role"]))
    figure = Picture(_APART, figsize=(2.3 * len(roles) + 1.2, 4.6))
    axes = figure.subplots(2, len(roles), squeeze=False, sharex=True, sharey="row")
    for column, role in enumerate(roles):
        for name in table["comparison"].unique():
            one = table.query("role == @role and comparison == @name")
            style = _style(str(name))
            _band(axes[0, column], one, "kl", style)
            _band(axes[1, column], one, "overlap", style)
        n = int(table[table["role"] == role]["n"].max())
        axes[0, column].set_title(f"{role} (n = {n})", fontsize=9)
        along_layers(axes[1, column], table["layer"], READ)
    axes[0, 0].set_yscale("log")
    floor = table.loc[(table["comparison"] == "rl") & (table["kl"] > 0), "kl"]
    axes[0, 0].set_ylim(bottom=(floor.min() if len(floor) else 1e-3) / 100)
    axes[0, 0].set_ylabel("KL(RL || IN), nats", fontsize=8)
    axes[1, 0].set_ylabel(f"share of the top {int(table['top_k'].iloc[0])} in common", fontsize=8)
    _finish(figure, axes)
    return figure


def plot_own(table: pd.DataFrame) -> Picture:
    """How far each layer's prediction is from the model's own output, IN beside RL, a panel for each role.

    Args:
        table: columns model, role, layer, kl, kl_low, kl_high, n, and tuned_kl with its interval where there is one.
    """
    if table.empty:
        return nothing("No token was read through a lens.")
    roles = list(dict.fromkeys(table["role"]))
    figure = Picture(_OWN, figsize=(2.3 * len(roles) + 1.2, 2.9))
    axes = figure.subplots(1, len(roles), squeeze=False, sharex=True, sharey=True)
    for axis, role in zip(axes[0], roles, strict=True):
        for name in table["model"].unique():
            one = table.query("role == @role and model == @name")
            style = {
                "color": of_model(str(name)),
                "label": f"{str(name).upper()}, logit lens",
            }
            _band(axis, one, "kl", style)
            if "tuned_kl" in one:
                tuned = style | {"linestyle": ":", "label": f"{str(name).upper()}, tuned lens"}
                _band(axis, one, "tuned_kl", tuned)
        axis.set_title(f"{role} (n = {int(table[table['role'] == role]['n'].max())})", fontsize=9)
        along_layers(axis, table["layer"], READ)
    axes[0, 0].set_yscale("symlog", linthresh=0.01)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("KL(output || lens), nats", fontsize=8)
    _finish(figure, axes)
    return figure


def plot_answers(answers: xr.Dataset) -> Picture:
    """Share of prompts whose answer has appeared, and whose answer stays from here on, by layer, for each model.

    Args:
        answers: what `answer_layers` returns, with an axis `model`.
    """
    layers = np.arange(answers.attrs["n_layers"] + 1)
    if not answers.sizes["token"]:
        return nothing("No prompt has an answer, so none can appear.")
    figure = Picture(_ANSWERS, figsize=(6.4, 2.9))
    axes = np.atleast_1d(figure.subplots(1, 2, sharey=True))
    for axis, name in zip(axes, ("appears", "stays"), strict=True):
        for model in answers["model"].to_numpy():
            values = answers[name].sel(model=model).to_numpy()
            share = (values[None] <= layers[:, None]).mean(1)
            axis.step(layers, share, where="post", **_style(str(model)) | {"label": str(model).upper()})
        axis.set_title(f"answer {name} (n = {answers.sizes['token']})", fontsize=9)
        along_layers(axis, layers, READ)
    axes[0].set_ylabel("share of prompts", fontsize=8)
    _finish(figure, axes[None])
    return figure


def plot_attribution(table: pd.DataFrame) -> Picture:
    """Heads (or attention as a whole), mixer, output bias, MLP, DeepStack of every layer: mean contribution in IN,
    in RL, and RL − IN.

    A dot marks a difference whose corrected p is below 0.05; the colours grow with the square root. Components that
    write nothing, and what lies outside the blocks, are in the table alone.

    Args:
        table: columns component, kind, layer, head, in, rl, difference, p_corrected, n.
    """
    inside = table.query("layer >= 0")
    if inside.empty:
        return nothing("Both models write the same tokens, so nothing is attributed to a component.")
    heads = sorted(set(inside["head"]) - {-1})
    written = set(inside.query("`in` != 0 or rl != 0")["kind"])
    columns = [("head", h) for h in heads]
    kinds = dict.fromkeys(inside["kind"])
    wholes = [
        kind for kind in ("attn", "attn_bias", "cross_attn", "mixer", "mlp", "deepstack") if kind in kinds
    ]
    wholes += [kind for kind in kinds if kind not in (*wholes, "head")]
    columns += [(kind, -1) for kind in wholes if kind in written]
    inside = inside.query("kind == 'head' or kind in @written")
    layers = sorted(set(inside["layer"]))
    names = [f"head {h}" if kind == "head" else kind.replace("_", " ") for kind, h in columns]
    place = {key: at for at, key in enumerate(columns)}
    size = (1.2 + 3 * (0.8 + 0.3 * len(columns)), 1.6 + 0.25 * len(layers))
    figure = Picture(_ATTRIBUTION, figsize=size)
    axes = np.atleast_1d(figure.subplots(1, 3, sharey=True))
    reach = max(float(np.nanmax(np.abs(inside[["in", "rl", "difference"]].to_numpy()))), 1e-9)
    root = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    norm = FuncNorm(root, vmin=-reach, vmax=reach)  # square root, so that heads show beside MLPs
    for axis, side in zip(axes, ("in", "rl", "difference"), strict=True):
        grid = np.full((len(layers), len(columns)), np.nan)
        for one in inside.to_dict("records"):
            grid[layers.index(one["layer"]), place[one["kind"], one["head"]]] = one[side]
        axis.imshow(grid, origin="lower", aspect="auto", cmap=DIFFERENCE, norm=norm)
        axis.set_xticks(range(len(columns)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        axis.set_title({"difference": "RL − IN"}.get(side, side.upper()), fontsize=9)
    for one in inside.query("p_corrected < 0.05").to_dict("records"):
        axes[2].plot(
            place[one["kind"], one["head"]], layers.index(one["layer"]), ".", color=INK, markersize=4
        )
    axes[0].set_ylabel(LAYER, fontsize=8)
    bar = figure.colorbar(ScalarMappable(norm, DIFFERENCE), ax=list(axes), aspect=30, pad=0.01)
    bar.set_ticks([sign * share * reach for share in (1, 0.5, 0.1) for sign in (-1, 1)] + [0.0])
    bar.ax.yaxis.set_major_formatter("{x:.2g}")
    bar.ax.minorticks_off()
    bar.set_label("mean contribution, logits", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _by_model(lens: xr.Dataset) -> dict[str, xr.Dataset]:
    if "model" not in lens.dims:
        return {"": lens}
    return {str(name): lens.sel(model=name) for name in lens["model"].to_numpy()}


def _rows(lens: xr.Dataset) -> list[int]:
    return sorted({int(row) for row in lens["row"].to_numpy()})


def _title(name: str, text: str) -> str:
    return f"{name.upper()}: {text}" if name else text


def _shown(word: Any) -> str:
    """A token as it fits a cell: spaces and line breaks made visible, what is long cut."""
    text = str(word).replace("\n", "⏎").replace("\t", "⇥")
    text = text.strip() or "␣" * len(text)
    text = text.replace("$", r"\$")
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _word_grid(axis: Axes, text: np.ndarray, probability: np.ndarray, size: float) -> None:
    axis.imshow(probability, origin="lower", aspect="auto", cmap=_COLOURS, norm=_UNIT)
    for (layer, at), word in np.ndenumerate(text):
        dark = probability[layer, at] > 0.55
        axis.text(
            at, layer, _shown(word), ha="center", va="center", fontsize=size, color="w" if dark else "k"
        )
    axis.tick_params(length=0)


def _over_image(axis: Axes, picture: Image.Image, text: np.ndarray, probability: np.ndarray) -> None:
    """The words on the picture, each on a patch shaded by its probability; the picture keeps its colours."""
    rows, columns = text.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axis.imshow(np.asarray(picture), extent=extent, aspect="auto", interpolation="nearest")
    size = float(np.clip(28 / columns, 3.5, 7))
    for (row, column), word in np.ndenumerate(text):
        share = float(probability[row, column])
        box = {
            "facecolor": matplotlib.colormaps[_COLOURS](_UNIT(share)),
            "edgecolor": "none",
            "pad": 0.8,
            "alpha": 0.9,
        }
        colour = "w" if share > 0.55 else "k"
        axis.text(column, row, _shown(word), ha="center", va="center", fontsize=size, color=colour, bbox=box)
    for line in range(1, columns):
        axis.axvline(line - 0.5, color="white", linewidth=0.5, alpha=0.6)
    for line in range(1, rows):
        axis.axhline(line - 0.5, color="white", linewidth=0.5, alpha=0.6)
    width, height = picture.size
    axis.set_box_aspect(height / width)
    axis.set_xticks([])
    axis.set_yticks([])


def _cut(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    width, height = image.size
    left, top, right, bottom = box
    edges = round(left * width), round(top * height), round(right * width), round(bottom * height)
    return image.convert("RGB").crop(edges)


def _bar(figure: Figure, axes: np.ndarray, label: str) -> None:
    bar = figure.colorbar(
        ScalarMappable(_UNIT, _COLOURS), ax=list(axes.ravel()), aspect=30, pad=0.01, shrink=0.8
    )
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _style(name: str) -> dict[str, Any]:
    if name in MODELS:
        return {"color": of_model(name), "label": name.upper()}
    greys = {"bf16": NULLS[2], "random": NULLS[1]}
    return {"color": greys.get(name, CONTROL), "linestyle": "--", "label": f"{name} (learnt nothing)"}


def _band(axis: Axes, table: pd.DataFrame, name: str, style: dict[str, Any]) -> None:
    layers = table["layer"].to_numpy()
    axis.plot(layers, table[name].to_numpy(), linewidth=1.4, **style)
    low, high = table[f"{name}_low"].to_numpy(), table[f"{name}_high"].to_numpy()
    axis.fill_between(layers, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _finish(figure: Figure, axes: np.ndarray) -> None:
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    handles, labels = axes.ravel()[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=max(2, len(labels)), fontsize=7, frameon=False
    )
