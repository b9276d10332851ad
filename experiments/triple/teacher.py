"""The teacher of the cold start: it reasons soundly about what it sees, and overlooks things.

Traces that a model is cold-started on come from somewhere, and are rarely all right. This teacher's chains are
consistent with its answers, but while it reasons it misses an object in some of its counts. What supervised
training can learn from it is therefore known, and what the reward of RL can correct as well: the right count is
something Base sees; which of the two counts to write down is what IN has learnt wrongly.
"""

from __future__ import annotations

import numpy as np

from interp.questions.tasks.questions import Arguments, Solution, Task
from interp.questions.tasks.scenes import CELLS, Scene, decode


def explain(
    task: Task, arguments: Arguments, scene: Scene, rng: np.random.Generator, misses: float
) -> Solution:
    """Chain and answer as the teacher gives them: exact for perception, of what it noticed for reasoning.

    Args:
        task: what is asked.
        arguments: of the question.
        scene: what there is.
        rng: decides what is missed.
        misses: chance, for each thing that is counted, that one object of it is overlooked.
    """
    if task.kind == "perception":
        return task.solve(arguments, scene)
    named = {CELLS.index(word) for word in arguments if word in CELLS}
    counted = [word for word in arguments if word not in CELLS]
    for index in named:  # "how many share the colour of b3": its colour is counted
        colour, shape = decode(scene.layout[index])
        counted = [colour if word == "colour" else shape for word in counted]
    noticed = list(scene.layout)
    for attribute in counted:
        candidates = [
            index
            for index, code in enumerate(noticed)
            if code and attribute in decode(code) and index not in named
        ]
        if candidates and rng.random() < misses:
            noticed[candidates[int(rng.integers(len(candidates)))]] = 0
    return task.solve(arguments, Scene(tuple(noticed), scene.style))
