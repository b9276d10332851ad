"""Which prompt a row borrows from: one that lines up, whatever the order of the prompts and the batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from interp.prompts import Prompt, collate
from interp.prompts.pairing import beside, partners


def prompt(*ids: int, size: tuple[int, int] | None = None, roles: str = "question") -> Prompt:
    image = (
        {} if size is None else {"pixel_values": torch.zeros(1, 3, 8, 8), "image_sizes": torch.tensor([size])}
    )
    return Prompt.from_inputs({"input_ids": torch.tensor([ids])} | image, [roles] * len(ids))


def test_partners_line_up_and_are_others() -> None:
    given = [prompt(5, 6, size=(4, 4)), prompt(5, 6, size=(4, 8)), prompt(5, 7, size=(4, 4)), prompt(5, 6, 7)]
    assert partners(given).tolist() == [2, -1, 0, -1]
    assert partners([prompt(5, 6), prompt(5, 6)]).tolist() == [-1, -1]  # the same is no other
    assert partners([prompt(5, 6), prompt(5, 7, roles="answer")]).tolist() == [-1, -1]


def test_partners_do_not_depend_on_the_order_of_the_prompts() -> None:
    given = [prompt(5, 6), prompt(9, 6), prompt(5, 6), prompt(1, 2), prompt(8, 8)]
    ids = [tuple(one.inputs["input_ids"][0].tolist()) for one in given]
    expected = {own: ids[int(other)] for own, other in zip(ids, partners(given), strict=True)}
    assert sorted(expected.values()) == sorted(set(ids))  # each lends once
    for order in itertools.permutations(range(5)):
        found = partners([given[row] for row in order])
        assert {ids[row]: ids[order[int(other)]] for row, other in zip(order, found, strict=True)} == expected


@pytest.mark.parametrize(
    ("rows", "expected"), [([0], [2]), ([1], []), ([1, 2], [1, 0]), ([2, 0, 1], [0, 2, 1])]
)
def test_the_partners_of_a_batch_stand_row_by_row(rows: list[int], expected: list[int]) -> None:
    """A row without one stands there itself; nothing is run where no row has one."""
    given = [prompt(5, 6), prompt(5, 6, 7), prompt(5, 7)]
    other = beside(given, rows, partners(given))
    assert other == [given[row] for row in expected]
    if other:
        assert torch.equal(collate(other).roles, collate([given[row] for row in rows]).roles)


def test_nothing_is_run_where_no_row_has_a_partner() -> None:
    given = [prompt(5, 6), prompt(5, 6, 7)]
    assert beside(given, [0, 1], partners(given)) == []


def test_strips_of_patches_are_joined_behind_one_another() -> None:
    """MiniCPM-V: all images are one row, [1 channel side patch*side]."""
    strips = [torch.full((1, 3, 2, 2 * n), float(n)) for n in (4, 6)]
    sizes = [torch.tensor([[2, 2]]), torch.tensor([[2, 3]])]
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    batch = collate(
        [
            Prompt.from_inputs(ids | {"pixel_values": strip, "target_sizes": size}, ["question"] * 3)
            for strip, size in zip(strips, sizes, strict=True)
        ]
    )
    assert torch.equal(batch.inputs["pixel_values"], torch.cat(strips, dim=-1))
    assert batch.inputs["target_sizes"].tolist() == [[2, 2], [2, 3]]
