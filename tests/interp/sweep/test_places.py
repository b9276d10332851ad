"""Which patches are meant, where those of several images stand in one row."""

from __future__ import annotations

import pytest
import torch

from hooks import FrankenlensError
from interp.prompts import Prompt, PromptBatch, collate
from interp.sweep.places import patch_mask


def batch_of(*given: dict[str, torch.Tensor]) -> PromptBatch:
    """Prompts of three tokens with these image tensors."""
    ids = torch.tensor([[5, 6, 7]])
    return collate([Prompt.from_inputs({"input_ids": ids} | one, ["question"] * 3) for one in given])


def scores_of(*sizes: int) -> torch.Tensor:
    """Scores [head query key] of images that do not look at one another."""
    seen = torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()
    return torch.randn(2, *seen.shape).masked_fill(~seen, -torch.inf)


def test_a_grid_says_whose_patches_are_whose() -> None:
    grids = [torch.tensor([[1, 2, 2]]), torch.tensor([[1, 2, 4]])]
    batch = batch_of(*({"image_grid_thw": grid, "pixel_values": torch.zeros(1, 3)} for grid in grids))
    everything = torch.zeros(2, 12, 12)  # all look at all: only the grid tells
    assert patch_mask(3, batch, everything, -1).nonzero()[:, 0].tolist() == [3, 4 + 3]
    twice = torch.zeros(2, 24, 24)  # two rows a patch
    assert patch_mask(3, batch, twice, -1).nonzero()[:, 0].tolist() == [3, 8 + 3]


@pytest.mark.parametrize("leaf", ["scores", "pattern"])
def test_who_looks_at_whom_says_it_where_a_grid_does_not_fit(leaf: str) -> None:
    grids = [torch.tensor([[1, 2, 2]]), torch.tensor([[1, 2, 4]])]
    batch = batch_of(*({"image_grid_thw": grid, "pixel_values": torch.zeros(1, 3)} for grid in grids))
    square = scores_of(5, 9)  # a class token each
    square = square if leaf == "scores" else square.softmax(-1)
    assert patch_mask(2, batch, square, -2).nonzero()[:, 0].tolist() == [2, 5 + 2]
    with pytest.raises(FrankenlensError, match='give "all", or a function of the batch'):
        patch_mask(2, batch, scores_of(5, 4, 4), -1)
    assert bool(patch_mask("all", batch, scores_of(5, 4, 4), -1).all())


def test_queries_and_keys_may_differ_in_number() -> None:
    batch = batch_of({"pixel_values": torch.zeros(1, 3, 4, 4)})
    square = torch.zeros(1, 2, 3, 7)
    assert patch_mask(1, batch, square, -2).tolist() == [[False, True, False]]
    assert patch_mask(6, batch, square, -1).nonzero()[:, 1].tolist() == [6]
