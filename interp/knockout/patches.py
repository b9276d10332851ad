"""Where the patches of a vision tower stand in the image, in the order in which the tower has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from hooks import FrankenlensError, HookedVLM
from interp.prompts import PromptBatch


def region(
    vlm: HookedVLM, top: float, left: float, bottom: float, right: float
) -> Callable[[PromptBatch], Bool[Tensor, "..."]]:
    """The patches whose centres lie in a box of every image; a place for knockouts in the vision tower.

    Args:
        vlm: the model whose tower it is.
        top, left, bottom, right: of the box, in shares of the image as the processor hands it over, 0 to 1.

    Returns:
        From a batch to a mask [patch] (packed towers) or [image patch]. The class token belongs to no box.

    Raises:
        FrankenlensError: an empty box, or an image that is cut into tiles; the latter when the place is asked for.
    """
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise FrankenlensError(
            f"region({top}, {left}, {bottom}, {right}): give 0 <= top < bottom <= 1 and 0 <= left < right <= 1"
        )

    def inside(batch: PromptBatch) -> Bool[Tensor, "..."]:
        y, x = patch_centres(vlm, batch).unbind(-1)
        return (y >= top) & (y < bottom) & (x >= left) & (x < right)

    inside.__name__ = f"region({top:g}, {left:g}, {bottom:g}, {right:g})"
    return inside


def patch_centres(vlm: HookedVLM, batch: PromptBatch) -> Float[Tensor, "*image patch yx"]:
    """Centre (down, across) of every patch in shares of its image, NaN for a class token.

    Raises:
        FrankenlensError: no images, or a family whose patches are not known to stand in one grid per image.
    """
    config: Any = vlm.model.config.vision_config
    if "image_grid_thw" in batch.inputs:
        merge = int(config.spatial_merge_size)
        grids = batch.inputs["image_grid_thw"].cpu()
        centres = torch.cat(
            [_merged(frames, rows, columns, merge) for frames, rows, columns in grids.tolist()]
        )
        if getattr(config, "window_size", None) and hasattr(config, "fullatt_block_indexes"):
            order, _ = get_vision_window_index(grids, merge, config.window_size, config.patch_size)
            centres = centres.unflatten(0, (-1, merge**2))[order].flatten(0, 1)
        return centres
    pixels = batch.inputs.get("pixel_values")
    if pixels is None or pixels.ndim != 4:
        what = "no image" if pixels is None else "images in tiles, each with patches of its own"
        raise FrankenlensError(f"region: this batch holds {what}; name patches by number or function instead")
    rows, columns = pixels.shape[-2] // config.patch_size, pixels.shape[-1] // config.patch_size
    centres = _grid(rows, columns).flatten(0, 1)
    if config.model_type.startswith("clip"):
        centres = torch.cat([torch.full((1, 2), torch.nan), centres])
    return centres.expand(len(pixels), -1, -1)


def _grid(rows: int, columns: int) -> Float[Tensor, "row column yx"]:
    y, x = torch.arange(rows) + 0.5, torch.arange(columns) + 0.5
    return torch.stack(torch.meshgrid(y / rows, x / columns, indexing="ij"), dim=-1)


def _merged(frames: int, rows: int, columns: int, merge: int) -> Float[Tensor, "patch yx"]:
    """Patches in the order of Qwen's image processor: those that are merged into one token stand together."""
    blocks = _grid(rows, columns).unflatten(1, (-1, merge)).unflatten(0, (-1, merge))
    return blocks.transpose(1, 2).flatten(0, 3).repeat(frames, 1)
