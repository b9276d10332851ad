"""Where each image token lies in its image: the grid of merged tokens of every family.

Qwen: patches merged 2 x 2, image by image, row by row. LLaVA: one square of patches, of the central crop that its
processor takes. Idefics3 and SmolVLM: the image in tiles, row by row, then the whole image once more, each a square.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from hooks import FrankenlensError
from interp.prompts import Prompt

Box = tuple[float, float, float, float]
_TILE = re.compile(r"row_(\d+)_col_(\d+)")
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """The tokens of an image, or of one tile of it.

    Attributes:
        image: which of the prompt's images.
        positions: of the tokens in the prompt, as they lie in the image.
        box: left, top, right, bottom of what they cover, as shares of the image's width and height.
        tile: (row, column) of a tile, from 1; None for the whole image.
    """

    image: int
    positions: Int[np.ndarray, "row column"]
    box: Box
    tile: tuple[int, int] | None = None


def image_grids(prompt: Prompt) -> list[ImageGrid]:
    """The grids of all images of a prompt, in its order.

    Raises:
        FrankenlensError: the prompt has no image tokens, or they form no grid that is known here.

    Example:
        >>> (grid,) = fl.image_grids(pair.builder.build(fl.tasks.sample("sum", 1, seed=0, split="map")[0]))
        >>> grid.positions.shape
        (4, 4)
    """
    positions = prompt.positions("image").numpy()
    named = f"prompt {prompt.example.id!r}"
    if not len(positions):
        raise FrankenlensError(f"{named} has no image token.")
    if "image_grid_thw" in prompt.inputs:
        return list(_qwen(prompt, positions, named))
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    if any(_tile_before(prompt, int(run[0])) for run in runs):
        return list(_tiles(prompt, runs, named))
    n = len(prompt.example.images)
    if len(positions) % n:
        raise FrankenlensError(f"{named}: {len(positions)} image tokens are no {n} equal squares.")
    return [
        ImageGrid(index, _square(some, named), _crop(prompt, index))
        for index, some in enumerate(np.split(positions, n))
    ]


def _qwen(prompt: Prompt, positions: np.ndarray, named: str) -> Iterator[ImageGrid]:
    merge, first = int(prompt.builder.processor.image_processor.merge_size), 0
    for image, (frames, height, width) in enumerate(prompt.inputs["image_grid_thw"].tolist()):
        shape = (height // merge, width // merge)
        if frames != 1:
            raise FrankenlensError(f"{named}: image {image} has {frames} frames; only images have a grid.")
        some = positions[first : first + math.prod(shape)]
        first += len(some)
        yield ImageGrid(image, some.reshape(shape), _WHOLE)
    if first != len(positions):
        raise FrankenlensError(
            f"{named}: image_grid_thw accounts for {first} of {len(positions)} image tokens."
        )


def _tiles(prompt: Prompt, runs: list[np.ndarray], named: str) -> Iterator[ImageGrid]:
    """Tiles until one that has no row and column: that is the whole image, which ends it."""
    image, pending = 0, list[tuple[tuple[int, int], np.ndarray]]()
    for run in runs:
        tile = _tile_before(prompt, int(run[0]))
        if tile is not None:
            pending.append((tile, run))
            continue
        rows, columns = (max((t[axis] for t, _ in pending), default=1) for axis in (0, 1))
        for (row, column), part in pending:
            box = ((column - 1) / columns, (row - 1) / rows, column / columns, row / rows)
            yield ImageGrid(image, _square(part, named), box, (row, column))
        yield ImageGrid(image, _square(run, named), _WHOLE)
        image, pending = image + 1, []
    if pending:
        raise FrankenlensError(f"{named}: the tiles of image {image} are not followed by the whole image.")


def _tile_before(prompt: Prompt, position: int) -> tuple[int, int] | None:
    """Row and column that the text just before an image token names: `<row_1_col_2>`, in one token or several."""
    text = prompt.builder.decode(prompt.ids[max(0, position - 12) : position])
    last = text.rsplit(prompt.builder.image_token, 1)[-1]
    found = _TILE.findall(last.rsplit("global", 1)[-1])
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def _square(run: np.ndarray, named: str) -> np.ndarray:
    side = math.isqrt(len(run))
    if side**2 != len(run):
        raise FrankenlensError(
            f"{named}: {len(run)} image tokens are no square; the grid of this family is not known."
        )
    return run.reshape(side, side)


def _crop(prompt: Prompt, image: int) -> Box:
    """The part of an image that is left when its shortest edge is resized and the centre is cut out."""
    processor: Any = prompt.builder.processor.image_processor
    size: Any = getattr(processor, "size", None) or {}
    shortest = size.get("shortest_edge") if hasattr(size, "get") else None
    if not getattr(processor, "do_center_crop", False) or not shortest:
        return _WHOLE
    width, height = prompt.example.images[image].size
    scale = shortest / min(width, height)
    crop = processor.crop_size
    across, down = min(1.0, crop["width"] / (width * scale)), min(1.0, crop["height"] / (height * scale))
    return ((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)
