"""The unit of data that every analysis takes: images, a question and the answer that counts as right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Example:
    """One question about zero or more images.

    Attributes:
        id: unique within its data set; results are labelled by it.
        images: in the order in which the question refers to them.
        question: the user's text, without template or image placeholders.
        answer: the reference answer, compared exactly (`interp.tasks.grade`).
        task: name of the task, `""` where there is only one.
        reasoning: a reference chain of thought, without delimiters; None where there is none.
        meta: whatever else is known (the synthetic scenes: see `interp.tasks`).
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    task: str = ""
    reasoning: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
