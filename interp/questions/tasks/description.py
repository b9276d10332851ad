"""A synthetic scene in words of the embedded triple's vocabulary."""

from __future__ import annotations

from hooks.errors import FrankenlensError
from interp.questions.examples import Example


def describe_scene(example: Example) -> str:
    """Every object of a synthetic example's scene, cell by cell: "b3 red circle , c1 blue square".

    It says what is where and counts nothing. The embedded models wrote such facts about an image while Base was
    trained; none of them ever read one in a question.

    Raises:
        FrankenlensError: the example is not of `interp.questions.tasks.sample`.

    Example:
        >>> (example,) = fl.tasks.sample("sum", 1, seed=0, split="map")
        >>> fl.tasks.describe_scene(example).split(" , ")[:2]
        ['a1 purple square', 'c1 purple square']
    """
    if "objects" not in example.meta:
        raise FrankenlensError(
            f"example {example.id!r} has no scene to describe; only those of interp.questions.tasks have"
        )
    return " , ".join(f"{item.cell} {item.colour} {item.shape}" for item in example.meta["objects"])
