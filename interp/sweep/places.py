"""Where an intervention acts: tokens by role or number, patches of images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import FrankenlensError
from interp.prompts import PromptBatch
from interp.prompts.pairing import image_grid, image_size
from interp.sweep.edits import New, Span

Where = str | int | Callable[[PromptBatch], Bool[Tensor, "..."]]
"""A role, "decision" (each row's last token) or "all"; a token counted from the row's first (negative: from the row's
end); or a function of the batch. For attention edges of the vision tower: "all", a patch counted from each image's
first, or a function of the batch to a mask [patch] (packed towers) or [image patch]."""
LEADING = ("batch", "pos", "key", "image", "patch", "row", "column", "media", "tile", "image_token")
"""Axes of an activation that number tokens, patches and what they belong to."""


def of_vision(name: str) -> bool:
    """Whether a hook point fires only where there is an image."""
    return name.startswith(("vision.", "tower_", "projector.")) or name.endswith("hook_deepstack")


def where_label(where: Where) -> str:
    """How a place is called in a result."""
    return getattr(where, "__name__", repr(where)) if callable(where) else str(where)


def where_mask(where: Where, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
    """The tokens of a batch that are meant.

    Raises:
        FrankenlensError: no such role, or a function that returns something else than a mask of the batch.
    """
    if callable(where):
        mask = where(batch)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != batch.roles.shape:
            raise FrankenlensError(
                f"where={where_label(where)} must return a bool mask of shape {tuple(batch.roles.shape)}"
            )
        return mask
    if isinstance(where, str):
        return batch.mask(where)
    tokens = torch.full_like(batch.lengths, where) if where >= 0 else batch.lengths + where
    columns = torch.arange(batch.roles.shape[1], device=batch.roles.device)
    there = (tokens >= 0) & (tokens < batch.lengths)
    return (columns[None] == batch.columns(tokens)[:, None]) & there[:, None]


def patch_mask(
    where: Where, batch: PromptBatch, scores: Float[Tensor, "*image head query key"], axis: int
) -> Bool[Tensor, "*image patch"]:
    """The patches that are meant, in the order in which the vision tower has them: queries (axis -2) or keys (-1).

    Raises:
        FrankenlensError: no such patch, or a function that returns something else than a mask of the patches.
    """
    shape = (*scores.shape[:-3], scores.shape[axis])
    if callable(where):
        mask = where(batch)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
            raise FrankenlensError(f"where={where_label(where)} must return a bool mask of shape {shape}")
        return mask.to(scores.device)
    mask = torch.zeros(shape, dtype=torch.bool, device=scores.device)
    if isinstance(where, str):
        return ~mask
    sizes = _patches(batch, scores, axis)
    if where >= min(sizes):
        raise FrankenlensError(
            f"there is no patch {where}; the smallest image of this batch has {min(sizes)}"
        )
    for number in range(len(sizes)):
        mask[..., sum(sizes[:number]) + where] = True
    return mask


def _patches(batch: PromptBatch, scores: Float[Tensor, "*image head query key"], axis: int) -> list[int]:
    """How many patches of each image stand behind one another in a row.

    Raises:
        FrankenlensError: those of several images do, and neither a grid nor who looks at whom says which are whose.
    """
    n = scores.shape[axis]
    if scores.ndim > 3 and scores.shape[0] > 1:
        return [n]
    grid = image_grid(batch.inputs)
    if grid is not None and n % int(grid.prod(-1).sum()) == 0:
        sizes = grid.prod(-1).tolist()
        return [size * (n // sum(sizes)) for size in sizes]
    images = sum(map(image_size, batch.prompts)) if grid is None else len(grid)
    apart = _apart(scores) if scores.shape[-2] == scores.shape[-1] else [n] * (images == 1)
    if len(apart) in (1, images):
        return apart
    raise FrankenlensError(
        f"the {n} patches of this batch's images stand in one row, and nothing says which are whose; give "
        '"all", or a function of the batch'
    )


def _apart(scores: Float[Tensor, "*image head query key"]) -> list[int]:
    """The lengths of the stretches of a row that look at nothing but themselves."""
    n = scores.shape[-1]
    seen = (scores > -torch.inf).reshape(-1, n, n).any(0)
    order = torch.arange(n, device=scores.device)
    reach = torch.where(seen | seen.T, order, -1).amax(-1).cummax(0).values
    ends = [-1, *(reach == order).nonzero()[:, 0].tolist()]
    return [after - before for before, after in pairwise(ends)]


def cut_patches(queries: Where, keys: Where, batch: PromptBatch, one_head: bool) -> New:
    """Scores (of one head, or of all) without the edges from patches `keys` to patches `queries`."""

    def new(scores: Tensor, span: Span) -> Tensor:
        whole = scores.unsqueeze(-3) if one_head else scores
        edges = (
            patch_mask(queries, batch, whole, -2)[..., None, :, None]
            & patch_mask(keys, batch, whole, -1)[..., None, None, :]
        )
        cut = whole.masked_fill(edges, -torch.inf)
        return cut.squeeze(-3) if one_head else cut

    return new
