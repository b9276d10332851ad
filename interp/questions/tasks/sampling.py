"""Seeded examples of a task, counterfactual pairs, and exact grading."""

from __future__ import annotations

import zlib

import numpy as np

from hooks.errors import FrankenlensError, nearest
from interp.questions.examples import Example
from interp.questions.tasks.questions import TASKS, Arguments, Task
from interp.questions.tasks.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    Split,
    decode,
    encode,
    render,
    sample_scene,
    split_of,
)


def sample(task: str, n: int, seed: int, split: Split) -> list[Example]:
    """n examples of a task, the same for the same arguments.

    `meta` of each holds `scene` (the `Scene`), `objects` (its `SceneObject`s), `arguments` and `split`.

    Raises:
        FrankenlensError: if the task or the split is unknown.

    Example:
        >>> (example,) = fl.tasks.sample("sum", 1, seed=0, split="map")
        >>> example.question, example.answer, example.images[0].size
        ('sum of cross and green ?', '3', (56, 56))
    """
    rng = _rng(task, seed, split)
    return [
        _example(_task(task), *draw(task, rng, split), split, f"{task}-{split}-{seed}-{index}")
        for index in range(n)
    ]


def draw(task: str, rng: np.random.Generator, split: Split) -> tuple[Scene, Arguments]:
    """One scene and the arguments of one question of it: what `sample` turns into an `Example`.

    Raises:
        FrankenlensError: if the task or the split is unknown.
    """
    while True:
        scene = sample_scene(rng, split)
        arguments = _task(task).propose(rng, scene)
        if arguments is not None:
            return scene, arguments


def counterfactual_pairs(task: str, n: int, seed: int, split: Split = "map") -> list[tuple[Example, Example]]:
    """n pairs of one question about two images that differ in exactly one attribute of one object.

    The answers differ, both scenes lie in `split`, and jitter, shade and noise are the same. `meta` of both
    also holds `changed`: `{"cell", "attribute" ("colour" | "shape"), "from", "to"}`, seen from that example.

    Raises:
        FrankenlensError: if the task or the split is unknown.

    Example:
        >>> ((one, other),) = fl.tasks.counterfactual_pairs("count", 1, seed=0)
        >>> one.question == other.question, one.answer, other.answer
        (True, '0', '1')
    """
    rng = _rng(task, seed, split, salt=1)
    pairs: list[tuple[Example, Example]] = []
    while len(pairs) < n:
        scene, arguments = draw(task, rng, split)
        edits = [edit for edit in _edits(scene) if split_of(edit[0].layout) == split]
        solve = _task(task).solve
        answer = solve(arguments, scene).answer
        edits = [edit for edit in edits if solve(arguments, edit[0]).answer != answer]
        if not edits:
            continue
        other, cell, attribute, old, new = edits[int(rng.integers(len(edits)))]
        name = f"{task}-{split}-{seed}-pair{len(pairs)}"
        pairs.append(
            (
                _example(_task(task), scene, arguments, split, f"{name}-clean", (cell, attribute, old, new)),
                _example(
                    _task(task), other, arguments, split, f"{name}-corrupt", (cell, attribute, new, old)
                ),
            )
        )
    return pairs


def neutral_pairs(task: str, n: int, seed: int, split: Split = "map") -> list[tuple[Example, Example]]:
    """The targets of `counterfactual_pairs`, each with an image that differs in one attribute but has the same answer.

    A control for counterfactual pairs; of the n targets, those that offer no such change are left out.

    Raises:
        FrankenlensError: if the task or the split is unknown.
    """
    rng = _rng(task, seed, split, salt=2)
    pairs: list[tuple[Example, Example]] = []
    for target, _ in counterfactual_pairs(task, n, seed, split):
        scene, arguments, solve = target.meta["scene"], target.meta["arguments"], _task(task).solve
        edits = [edit for edit in _edits(scene) if split_of(edit[0].layout) == split]
        edits = [edit for edit in edits if solve(arguments, edit[0]).answer == target.answer]
        if edits:
            other, *changed = edits[int(rng.integers(len(edits)))]
            cell, attribute, old, new = changed
            name = target.id.removesuffix("-clean") + "-neutral"
            source = _example(_task(task), other, arguments, split, name, (cell, attribute, new, old))
            pairs.append((target, source))
    return pairs


def grade(prediction: str | None, example: Example) -> bool:
    """True if the prediction is the answer, word for word; None (nothing that parses) is wrong.

    Example:
        >>> (example,) = fl.tasks.sample("sum", 1, seed=0, split="map")
        >>> fl.tasks.grade(example.answer, example), fl.tasks.grade(None, example)
        (True, False)
    """
    return prediction is not None and prediction.split() == example.answer.split()


def chain(example: Example) -> str:
    """The gold chain of thought of a synthetic example, without delimiters.

    Raises:
        FrankenlensError: if the example has none, which is so for users' own data.

    Example:
        >>> (example,) = fl.tasks.sample("sum", 1, seed=0, split="map")
        >>> fl.tasks.chain(example)
        'count cross 2 , count green 1'
    """
    if example.reasoning is None:
        raise FrankenlensError(
            f"example {example.id!r} has no reference chain; only examples of interp.questions.tasks.sample have"
        )
    return example.reasoning


def _task(name: str) -> Task:
    if name not in TASKS:
        raise FrankenlensError(
            f"there is no task {name!r}, only {', '.join(TASKS)}. {nearest(name, TASKS)}".strip()
        )
    return TASKS[name]


def _rng(task: str, seed: int, split: str, salt: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, salt, zlib.crc32(f"{task}/{split}".encode())])


def _edits(scene: Scene) -> list[tuple[Scene, str, str, str, str]]:
    """Every change of one attribute of one object: (scene, cell, attribute, from, to)."""
    edits = []
    for item, index in zip(scene.objects, np.flatnonzero(scene.layout).tolist(), strict=True):
        colour, shape = decode(scene.layout[index])
        options = [("colour", colour, new, encode(new, shape)) for new in COLOURS if new != colour]
        options += [("shape", shape, new, encode(colour, new)) for new in SHAPES if new != shape]
        for attribute, old, new, code in options:
            layout = (*scene.layout[:index], code, *scene.layout[index + 1 :])
            edits.append((Scene(layout, scene.style), item.cell, attribute, old, new))
    return edits


def _example(
    task: Task,
    scene: Scene,
    arguments: Arguments,
    split: str,
    name: str,
    changed: tuple[str, str, str, str] | None = None,
) -> Example:
    solution = task.solve(arguments, scene)
    meta = {"scene": scene, "objects": scene.objects, "arguments": arguments, "split": split}
    if changed is not None:
        meta["changed"] = dict(zip(("cell", "attribute", "from", "to"), changed, strict=True))
    question = task.question(arguments)
    return Example(name, (render(scene),), question, solution.answer, task.name, solution.chain, meta)
