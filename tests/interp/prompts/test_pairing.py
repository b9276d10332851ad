"""Which prompt a row borrows from: one that lines up, whatever the order of the prompts and the batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hooks.errors import FrankenlensError
from interp.prompts import Prompt, collate
from interp.prompts.pairing import beside, of_rows, partners


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


def pictured(*sizes: tuple[int, int], kind: str = "packed") -> Prompt:
    """A prompt with images of these sizes in patches, if any: packed, one image each row, or one long row of all."""
    grid = torch.tensor(sizes)
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor([[5, 6, 7]])}
    if sizes and kind == "packed":
        grids = torch.cat([torch.ones(len(sizes), 1, dtype=torch.long), grid], 1)
        inputs |= {"pixel_values": torch.zeros(int(grid.prod(-1).sum()), 12), "image_grid_thw": grids}
    elif sizes:
        inputs |= {"pixel_values": torch.zeros(len(sizes), 3, 8, 8)}
        if kind == "padded":
            inputs |= {"image_sizes": grid}
    return Prompt.from_inputs(inputs, ["question"] * 3)


def rows_of(parts: tuple[torch.Tensor, ...]) -> list[list[float]]:
    return [part.flatten().tolist() for part in parts]


@pytest.mark.parametrize("per_patch", [1, 3])
def test_the_vision_sides_rows_go_with_their_prompts(per_patch: int) -> None:
    """Patches, or what is made of four of them: images of other sizes, two in one prompt, none in another."""
    given = [pictured((2, 2)), pictured((2, 4), (4, 4)), pictured(), pictured((4, 2))]
    n = [4 * per_patch, 24 * per_patch, 0, 8 * per_patch]
    own = [torch.arange(float(n[row])) + 1000 * row for row in range(4)]
    for order in itertools.permutations(range(4)):
        batch = collate([given[row] for row in order])
        parts, axis = of_rows(torch.cat([own[row] for row in order])[:, None], batch)
        assert axis == 0 and rows_of(parts) == [own[row].tolist() for row in order]
        merged = torch.cat([own[row][: n[row] // 4] for row in order])[:, None]
        parts, _ = of_rows(merged, batch)
        assert rows_of(parts) == [own[row][: n[row] // 4].tolist() for row in order]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_images_of_one_long_row_go_with_their_prompts(order: tuple[int, ...]) -> None:
    """[1 patch d]: the patches of all images behind one another, by the sizes that a processor names."""
    given = [pictured((2, 2), kind="padded"), pictured((2, 4), kind="padded"), pictured()]
    own = [torch.arange(4.0), torch.arange(8.0) + 100, torch.arange(0.0)]
    value = torch.cat([own[row] for row in order])[None, :, None]
    parts, axis = of_rows(value, collate([given[row] for row in order]))
    assert axis == 1 and rows_of(parts) == [own[row].tolist() for row in order]


def test_whole_images_and_a_single_one() -> None:
    """[image patch d], one row an image: cut along the first axis, though a single image has a first axis of one."""
    alone = collate([pictured(), pictured((8, 8), kind="whole")])
    parts, axis = of_rows(torch.arange(5.0)[None, :, None], alone)
    assert axis == 0 and [len(part) for part in parts] == [0, 1]
    several = collate([pictured((8, 8), kind="whole"), pictured(), pictured((8, 8), (8, 8), kind="whole")])
    parts, axis = of_rows(torch.arange(6.0).reshape(3, 2, 1), several)
    assert axis == 0 and rows_of(parts) == [[0, 1], [], [2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("sizes", "n", "match"),
    [
        (((2, 2), (2, 4)), 7, r"7 rows of the vision side do not divide over images of sizes \[4, 8\]"),
        (((2, 2), (2, 4)), 4, r"4 rows .* \[4, 8\]"),  # 1 1/3 and 2 2/3
        ((None, None), 4, r"4 rows .* \[0, 0\]"),
    ],
)
def test_rows_that_do_not_divide_over_the_images_are_refused(sizes: Any, n: int, match: str) -> None:
    batch = collate([pictured() if size is None else pictured(size) for size in sizes])
    with pytest.raises(FrankenlensError, match=match):
        of_rows(torch.zeros(n, 2), batch)


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
