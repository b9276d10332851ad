"""The synthetic questions: answers checked against an independent recount, splits, pairs, grading."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageChops

from hooks.errors import FrankenlensError
from interp.questions import tasks
from interp.questions.examples import Example
from interp.questions.tasks.scenes import TILE, render_batch

ALL = (*tasks.PERCEPTION, *tasks.REASONING)


def recount(example: Example) -> str:
    """The answer, from the objects in `meta` and the words of the question alone."""
    objects, words = example.meta["objects"], example.question.split()

    def count(word: str) -> int:
        return sum(word in (item.colour, item.shape) for item in objects)

    def at(cell: str, aspect: str) -> str:
        return next(getattr(item, aspect) for item in objects if item.cell == cell)

    match words:
        case ["what", ("colour" | "shape") as aspect, "is", "at", cell, "?"]:
            return at(cell, aspect)
        case ["how", "many", "are", word, "?"]:
            return str(count(word))
        case ["is", "there", "a", colour, shape, "?"]:
            return "yes" if any((o.colour, o.shape) == (colour, shape) for o in objects) else "no"
        case ["sum", "of", first, "and", second, "?"]:
            return str(count(first) + count(second))
        case ["difference", "of", first, "and", second, "?"]:
            return str(abs(count(first) - count(second)))
        case ["more", first, "or", second, "?"]:
            n, m = count(first), count(second)
            return "equal" if n == m else first if n > m else second
        case ["how", "many", "share", "the", aspect, "of", cell, "?"]:
            return str(count(at(cell, aspect)))
    raise AssertionError(example.question)


@pytest.mark.parametrize("task", ALL)
def test_answer_is_what_a_recount_of_the_scene_gives(task: str):
    for example in tasks.sample(task, 60, seed=1, split="validation"):
        assert example.answer == recount(example)
        assert tasks.chain(example).split()
        assert example.task == task


@pytest.mark.parametrize("task", ALL)
def test_no_answer_is_common_enough_to_be_a_good_guess(task: str):
    answers = [example.answer for example in tasks.sample(task, 200, seed=2, split="train")]
    share = max(answers.count(answer) for answer in set(answers)) / len(answers)
    assert share <= (0.6 if task == "exists" else 0.45)


@pytest.mark.parametrize("task", ALL)
def test_same_seed_gives_the_same_examples_and_another_seed_others(task: str):
    first, again, other = (tasks.sample(task, 5, seed, "test") for seed in (3, 3, 4))
    assert [e.question for e in first] == [e.question for e in again]
    assert all(a.images[0].tobytes() == b.images[0].tobytes() for a, b in zip(first, again, strict=True))
    assert [e.meta["scene"] for e in first] != [e.meta["scene"] for e in other]


def test_ids_are_unique_across_tasks_and_splits():
    ids = [e.id for task in ALL for split in tasks.SPLITS for e in tasks.sample(task, 3, 0, split)]
    assert len(set(ids)) == len(ids)


def test_splits_never_share_a_layout():
    layouts = {
        split: {e.meta["scene"].layout for task in ALL for e in tasks.sample(task, 20, 0, split)}
        for split in tasks.SPLITS
    }
    for split, scenes in layouts.items():
        assert all(tasks.split_of(layout) == split for layout in scenes)
        assert not any(scenes & layouts[other] for other in tasks.SPLITS if other != split)


@pytest.mark.parametrize("task", ALL)
def test_counterfactual_pairs_differ_in_exactly_one_attribute_of_one_object(task: str):
    for clean, corrupt in tasks.counterfactual_pairs(task, 8, seed=0):
        assert clean.question == corrupt.question
        assert clean.answer == recount(clean) != recount(corrupt) == corrupt.answer
        changes = [
            (before.cell, attribute, getattr(before, attribute), getattr(after, attribute))
            for before, after in zip(clean.meta["objects"], corrupt.meta["objects"], strict=True)
            for attribute in ("cell", "colour", "shape")
            if getattr(before, attribute) != getattr(after, attribute)
        ]
        changed = clean.meta["changed"]
        assert changes == [(changed["cell"], changed["attribute"], changed["from"], changed["to"])]
        assert corrupt.meta["changed"]["to"] == changed["from"]
        assert tasks.split_of(corrupt.meta["scene"].layout) == "map"
        _assert_only_one_tile_differs(clean, corrupt, changed["cell"])


def _assert_only_one_tile_differs(clean: Example, corrupt: Example, cell: str) -> None:
    box = ImageChops.difference(clean.images[0], corrupt.images[0]).getbbox()
    assert box is not None
    row, column = divmod(tasks.CELLS.index(cell), 4)
    left, top, right, bottom = box
    assert column * TILE <= left and right <= (column + 1) * TILE
    assert row * TILE <= top and bottom <= (row + 1) * TILE


def test_batch_is_drawn_pixel_for_pixel_like_single_images():
    scenes = [example.meta["scene"] for example in tasks.sample("sum", 4, 0, "train")]
    assert all(
        np.array_equal(np.asarray(tasks.render(scene)), drawn)
        for scene, drawn in zip(scenes, render_batch(scenes), strict=True)
    )


def test_image_has_16_cells_of_14_pixels():
    (example,) = tasks.sample("count", 1, 0, "train")
    assert example.images[0].size == (56, 56) and example.images[0].mode == "RGB"
    assert 5 <= len(example.meta["objects"]) <= 10


def test_grading_is_exact():
    example = Example("x", (), "how many ?", "12")
    assert tasks.grade(" 12 ", example)
    assert not any(tasks.grade(wrong, example) for wrong in ("1", "12 .", "1 2", "", None))


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(FrankenlensError, match="colour_at, shape_at"):
        tasks.sample("colour", 1, 0, "train")
    with pytest.raises(FrankenlensError, match="no reference chain"):
        tasks.chain(Example("mine", (), "?", "1"))
