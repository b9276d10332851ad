"""Synthetic questions about small scenes, with exact answers, seeded splits and counterfactual pairs."""

from interp.questions.tasks.description import describe_scene
from interp.questions.tasks.questions import PERCEPTION, REASONING, TASKS, Solution, Task
from interp.questions.tasks.sampling import chain, counterfactual_pairs, grade, neutral_pairs, sample
from interp.questions.tasks.scenes import (
    CELLS,
    COLOURS,
    SHAPES,
    SPLITS,
    Scene,
    SceneObject,
    Split,
    render,
    split_of,
)

__all__ = [
    "CELLS",
    "COLOURS",
    "PERCEPTION",
    "REASONING",
    "SHAPES",
    "SPLITS",
    "TASKS",
    "Scene",
    "SceneObject",
    "Solution",
    "Split",
    "Task",
    "chain",
    "counterfactual_pairs",
    "describe_scene",
    "grade",
    "neutral_pairs",
    "render",
    "sample",
    "split_of",
]
