"""Attention patterns to look at in a notebook: tokens and image patches, coloured by who attends to whom.

One self-contained HTML document, without network and without other people's scripts; what CircuitsVis shows for text,
with the image's patches beside it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt16
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from interp.lens.image_grid import ImageGrid, image_grids
from interp.metrics.logits import sparing_logits
from interp.prompts import Prompt
from interp.prompts.roles import ROLES

STEPS = 65535
"""Weights are stored in steps of 1 / 65535."""
SIDE = 360
"""Longest side of a shown image, in pixels."""


@dataclass(frozen=True, eq=False)
class AttentionView:
    """A page of attention patterns; a notebook shows it by itself.

    Attributes:
        page: the HTML document.
        height: what it needs in a notebook, in pixels.
    """

    page: str = field(repr=False)
    height: int = 640

    def save(self, path: str | Path) -> Path:
        """Write the document."""
        path = Path(path)
        path.write_text(self.page, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        # A frame of its own: styles do not meet, and the page reaches nothing of the notebook.
        source = html.escape(self.page, quote=True)
        style = f"width:100%;height:{self.height}px;border:0"
        return f'<iframe srcdoc="{source}" style="{style}" sandbox="allow-scripts"></iframe>'


@torch.no_grad()
def attention_view(
    vlm: HookedVLM,
    prompt: Prompt,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    queries: str = "all",
    max_mb: float = 4.0,
) -> AttentionView:
    """The attention patterns of some heads on one prompt, its images included.

    Args:
        vlm: whose attention.
        prompt: with or without a trace.
        layers: decoder layers, None for all; negative counts from the last.
        heads: of each layer, None for all.
        queries: role of the tokens that attend; "all" for every token.
        max_mb: refuse a larger page, in 10^6 bytes.

    Raises:
        FrankenlensError: no such layer, head or role, no token of that role, or the page would be too large.
    """
    layers = _chosen("layer", layers, vlm.n_layers)
    heads = _chosen("head", heads, vlm.n_heads)
    rows = _rows(prompt, queries)
    size = 8 / 3 * len(layers) * len(heads) * len(rows) * len(prompt)  # two bytes each, in base64
    if size > max_mb * 1e6:
        raise FrankenlensError(
            f"{len(layers)} layers x {len(heads)} heads x {len(rows)} queries x {len(prompt)} keys make a page of "
            f"{size / 1e6:.1f} MB, more than max_mb={max_mb:g}. Choose layers, heads or a role of queries, e.g. "
            'layers=[-1], queries="reasoning".'
        )
    names = {f"blocks.{layer}.attn.hook_pattern": layer for layer in layers}
    with sparing_logits(vlm) as extra:
        _, cache = vlm.run_with_cache(prompt.inputs, list(names), use_cache=False, **extra)
    patterns = {layer: cache[name][0, heads][:, rows].float().cpu() for name, layer in names.items()}
    grids = image_grids(prompt) if "image" in prompt.roles else []
    page = _template().render(
        data={
            "layers": layers,
            "heads": heads,
            "rows": rows,
            "tokens": [prompt.builder.decode([i]) for i in prompt.ids],
            "roles": list(prompt.roles),
            "patterns": {str(n): [_packed(head) for head in pattern] for n, pattern in patterns.items()},
            "panels": _panels(prompt, grids),
        },
        title=f"{type(vlm.model).__name__}, prompt {prompt.example.id}",
        steps=STEPS,
    )
    return AttentionView(page)


def _chosen(kind: str, wanted: Sequence[int] | None, n: int) -> list[int]:
    chosen = list(range(n)) if wanted is None else [int(i) for i in wanted]
    if bad := [i for i in chosen if not -n <= i < n]:
        raise FrankenlensError(f"there is no {kind} {bad[0]}: this model has {kind}s 0 to {n - 1}.")
    if not chosen:
        raise FrankenlensError(f"{kind}s is empty; give some of 0 to {n - 1}, or None for all.")
    return sorted({i % n for i in chosen})


def _rows(prompt: Prompt, queries: str) -> list[int]:
    if queries != "all" and queries not in ROLES:
        raise FrankenlensError(f"there is no role {queries!r}; choose one of {', '.join(ROLES)} or all")
    rows = list(range(len(prompt))) if queries == "all" else prompt.positions(queries).tolist()
    if not rows:
        raise FrankenlensError(f"prompt {prompt.example.id!r} has no {queries} token to attend from.")
    return rows


def _packed(pattern: Float[Tensor, "query key"]) -> str:
    """Weights in steps of 1 / STEPS, little-endian, base64."""
    steps: UInt16[np.ndarray, "query key"] = (pattern.numpy() * STEPS).round().clip(0, STEPS).astype("<u2")
    return base64.b64encode(steps.tobytes()).decode()


def _panels(prompt: Prompt, grids: Sequence[ImageGrid]) -> list[dict[str, Any]]:
    """One picture per image, and another for its tiles where it has them; each patch as token and box in percent."""
    panels: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for grid in grids:
        left, top, right, bottom = (100 * share for share in grid.box)
        n_rows, n_columns = grid.positions.shape
        width, height = (right - left) / n_columns, (bottom - top) / n_rows
        cells = panels.setdefault((grid.image, grid.tile is not None), [])
        for (row, column), position in np.ndenumerate(grid.positions):
            box = [left + column * width, top + row * height, width, height]
            cells.append({"token": int(position), "box": [round(value, 3) for value in box]})
    return [
        {
            "label": f"image {image}" + (", in tiles" if tiled else ""),
            "source": _data_uri(prompt.example.images[image]),
            "cells": cells,
        }
        for (image, tiled), cells in sorted(panels.items())
    ]


def _data_uri(image: Image.Image) -> str:
    """The image, no larger than SIDE, in whichever of PNG and JPEG is shorter."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    encoded = []
    for kind in ("png", "jpeg"):
        buffer = io.BytesIO()
        small.save(buffer, kind, **({"quality": 85} if kind == "jpeg" else {}))
        encoded.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(encoded, key=len)


def _template() -> Any:
    source = files("interp.attention").joinpath("view.html.j2").read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined, autoescape=True).from_string(source)
