"""The questions that can be asked of a scene, with exact answers and a gold chain of thought."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from interp.questions.tasks.scenes import CELLS, COLOURS, SHAPES, Scene, decode

ATTRIBUTES = (*COLOURS, *SHAPES)
MAX_COUNT = 6
"""No question asks for a single count above this."""

Arguments = tuple[str, ...]


@dataclass(frozen=True)
class Solution:
    """What is right for one question of one scene: the answer, and the chain that leads to it."""

    answer: str
    chain: str


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: key in `TASKS`.
        kind: perception needs one look, reasoning combines several.
        template: the question, with `{0}`, `{1}` for the arguments.
        propose: draws arguments for a scene; None where the scene offers none.
        solve: arguments and scene -> answer and chain.
    """

    name: str
    kind: Literal["perception", "reasoning"]
    template: str
    propose: Callable[[np.random.Generator, Scene], Arguments | None]
    solve: Callable[[Arguments, Scene], Solution]

    def question(self, arguments: Arguments) -> str:
        """The text of the question."""
        return self.template.format(*arguments)


def counts(scene: Scene) -> dict[str, int]:
    """How many objects have each colour and each shape."""
    result = dict.fromkeys(ATTRIBUTES, 0)
    for code in scene.layout:
        if code:
            for attribute in decode(code):
                result[attribute] += 1
    return result


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _spread_attributes(rng: np.random.Generator, scene: Scene, n: int) -> Arguments | None:
    """n different attributes, small and large counts about equally often."""
    by_count: dict[int, list[str]] = {}
    for attribute, count in counts(scene).items():
        if count <= MAX_COUNT:
            by_count.setdefault(count, []).append(attribute)
    chosen: list[str] = []
    while len(chosen) < n:
        levels = [level for level, names in by_count.items() if set(names) - set(chosen)]
        if not levels:
            return None
        level = levels[int(rng.integers(len(levels)))]
        chosen.append(_pick(rng, [name for name in by_count[level] if name not in chosen]))
    return tuple(chosen)


def _propose_cell(rng: np.random.Generator, scene: Scene) -> Arguments | None:
    return (_pick(rng, [CELLS[i] for i, code in enumerate(scene.layout) if code]),)


def _propose_aspect_and_cell(rng: np.random.Generator, scene: Scene) -> Arguments | None:
    options = [
        (aspect, CELLS[i])
        for i, code in enumerate(scene.layout)
        for aspect in ("colour", "shape")
        if code and counts(scene)[_aspect(code, aspect)] <= MAX_COUNT
    ]
    return options[int(rng.integers(len(options)))] if options else None


def _propose_kind(rng: np.random.Generator, scene: Scene) -> Arguments | None:
    """A colour and a shape that occur together in half of the cases; else each occurs, where possible."""
    present = {decode(code) for code in scene.layout if code}
    colours, shapes = {colour for colour, _ in present}, {shape for _, shape in present}
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
    near = [(c, s) for c, s in absent if c in colours and s in shapes]
    options = sorted(present) if rng.random() < 0.5 else near or absent
    return options[int(rng.integers(len(options)))]


def _aspect(code: int, aspect: str) -> str:
    return decode(code)[("colour", "shape").index(aspect)]


def _at(aspect: str) -> Callable[[Arguments, Scene], Solution]:
    def solve(arguments: Arguments, scene: Scene) -> Solution:
        value = _aspect(scene.layout[CELLS.index(arguments[0])], aspect)
        return Solution(value, f"{arguments[0]} {value}")

    return solve


def _solve_count(arguments: Arguments, scene: Scene) -> Solution:
    n = counts(scene)[arguments[0]]
    return Solution(str(n), f"count {arguments[0]} {n}")


def _solve_exists(arguments: Arguments, scene: Scene) -> Solution:
    colour, shape = arguments
    cell = next((item.cell for item in scene.objects if (item.colour, item.shape) == arguments), None)
    return Solution("yes" if cell else "no", f"find {colour} {shape} {cell or 'none'}")


def _solve_two(combine: Callable[[str, int, str, int], str]) -> Callable[[Arguments, Scene], Solution]:
    def solve(arguments: Arguments, scene: Scene) -> Solution:
        (first, second), n = arguments, counts(scene)
        chain = f"count {first} {n[first]} , count {second} {n[second]}"
        return Solution(combine(first, n[first], second, n[second]), chain)

    return solve


def _solve_same(arguments: Arguments, scene: Scene) -> Solution:
    aspect, cell = arguments
    value = _aspect(scene.layout[CELLS.index(cell)], aspect)
    n = counts(scene)[value]
    return Solution(str(n), f"{cell} {value} , count {value} {n}")


def _more(first: str, n_first: int, second: str, n_second: int) -> str:
    return "equal" if n_first == n_second else first if n_first > n_second else second


def _two(rng: np.random.Generator, scene: Scene) -> Arguments | None:
    return _spread_attributes(rng, scene, 2)


def _one(rng: np.random.Generator, scene: Scene) -> Arguments | None:
    return _spread_attributes(rng, scene, 1)


_ALL = (
    Task("colour_at", "perception", "what colour is at {0} ?", _propose_cell, _at("colour")),
    Task("shape_at", "perception", "what shape is at {0} ?", _propose_cell, _at("shape")),
    Task("count", "perception", "how many are {0} ?", _one, _solve_count),
    Task("exists", "perception", "is there a {0} {1} ?", _propose_kind, _solve_exists),
    Task("sum", "reasoning", "sum of {0} and {1} ?", _two, _solve_two(lambda a, n, b, m: str(n + m))),
    Task(
        "difference",
        "reasoning",
        "difference of {0} and {1} ?",
        _two,
        _solve_two(lambda a, n, b, m: str(abs(n - m))),
    ),
    Task("more", "reasoning", "more {0} or {1} ?", _two, _solve_two(_more)),
    Task("same", "reasoning", "how many share the {0} of {1} ?", _propose_aspect_and_cell, _solve_same),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
PERCEPTION: tuple[str, ...] = tuple(task.name for task in _ALL if task.kind == "perception")
REASONING: tuple[str, ...] = tuple(task.name for task in _ALL if task.kind == "reasoning")
