"""What a row borrows of another's images, however the vision side lays them out."""

from __future__ import annotations

import pytest
import torch

from hooks import FrankenlensError
from interp.prompts import Prompt, collate
from interp.prompts.pairing import PatchBatch, borrowed, partners

IDS = torch.tensor([[5, 6, 7]])


def rows_of(*given: dict[str, torch.Tensor]) -> PatchBatch:
    """Prompts of three tokens with these image tensors."""
    batch = collate([Prompt.from_inputs({"input_ids": IDS} | one, ["question"] * 3) for one in given])
    return PatchBatch(batch, batch.mask("all"), partners(batch))


def test_images_change_places_in_one_long_row() -> None:
    """Pixtral: padded to the largest, so that only `image_sizes` says how long each is."""
    sizes = [torch.tensor([[4, 4]]), torch.tensor([[4, 8]]), torch.tensor([[4, 4]])]
    rows = rows_of(*({"pixel_values": torch.zeros(1, 3, 8, 8), "image_sizes": size} for size in sizes))
    assert rows.partner.tolist() == [2, -1, 0]
    value = torch.arange(16.0).reshape(1, 16, 1)
    got = borrowed(value, True, rows)[0, :, 0].tolist()
    assert got == [*range(12, 16), *range(4, 12), *range(4)]


def test_strips_of_patches_are_joined_behind_one_another() -> None:
    """MiniCPM-V: all images are one row, [1 channel side patch*side]."""
    strips = [torch.full((1, 3, 2, 2 * n), float(n)) for n in (4, 6)]
    sizes = [torch.tensor([[2, 2]]), torch.tensor([[2, 3]])]
    batch = rows_of(
        *({"pixel_values": s, "target_sizes": n} for s, n in zip(strips, sizes, strict=True))
    ).batch
    assert torch.equal(batch.inputs["pixel_values"], torch.cat(strips, dim=-1))
    assert batch.inputs["target_sizes"].tolist() == [[2, 2], [2, 3]]


def test_rows_that_nothing_divides_are_refused() -> None:
    rows = rows_of(*({"pixel_values": torch.zeros(1, 3, 4, 4)} for _ in range(2)))
    with pytest.raises(FrankenlensError, match="do not divide over images of sizes"):
        borrowed(torch.zeros(3, 5), True, rows)
