"""What the readers of JSONL files share: lines to objects, fields to text and images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError
from hooks.extras import MissingPackage
from interp.questions.examples import Example
from interp.questions.grading import GRADERS, reference_fault
from interp.questions.readers.report import Failure, RowError, shown

IMAGE_MARKER = "<image>"
NUMBERS = ("tolerance", "decimals", "iou")
"""What a grader takes from a row as a number."""
Row = Mapping[str, Any]


def objects(path: Path) -> tuple[list[tuple[int, Row]], list[Failure]]:
    """The JSON objects of a file with their line numbers, and the lines that hold none.

    Raises:
        FrankenlensError: no such file, or no objects.
    """
    if not path.is_file():
        raise FrankenlensError(f"{path}: no such file; give a JSONL file with one object per line")
    rows: list[tuple[int, Row]] = []
    failures: list[Failure] = []
    for n, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            failures.append(Failure(n, f"no JSON: {error}"))
            continue
        if isinstance(row, dict):
            rows.append((n, row))
        else:
            failures.append(Failure(n, f"a JSON {type(row).__name__}, not an object"))
    if not rows:
        first = f"; row {failures[0].row}: {failures[0].reason}" if failures else ""
        raise FrankenlensError(f"{path} holds no JSON objects{first}")
    return rows, failures


def text_of(row: Row, name: str) -> str:
    """A field's text; a number is written out."""
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"the field {name!r} must hold text, found {shown(value)}")
    return value


def without_markers(question: str, n_images: int) -> str:
    """Many data sets write `<image>` before the question, once per image; the chat template does that itself."""
    text, markers = question.lstrip(), 0
    while text.startswith(IMAGE_MARKER):
        text, markers = text[len(IMAGE_MARKER) :].lstrip(), markers + 1
    if markers > n_images or IMAGE_MARKER in text:
        raise RowError(
            f"the question has {question.count(IMAGE_MARKER)} {IMAGE_MARKER} markers and the row {n_images} images; "
            "markers may only stand before the question, at most one per image"
        )
    if markers and not text:
        raise RowError(f"the question holds nothing but {IMAGE_MARKER}")
    return text if markers else question


def gradable(example: Example) -> Example:
    """The example, if its grader is known and would accept the reference itself.

    Raises:
        RowError: says what is wrong with it.
        MissingPackage: its grader needs a package that is not installed.
    """
    grader, choices = example.meta.get("grader"), example.meta.get("choices", ())
    if not isinstance(choices, (list, tuple)) or not all(isinstance(choice, str) for choice in choices):
        raise RowError(f"the choices must be a list of texts, found {shown(choices)}")
    if grader is not None and (not isinstance(grader, str) or grader not in GRADERS):
        raise RowError(f"there is no grader {shown(grader)}, only {', '.join(GRADERS)}")
    for name in NUMBERS:
        value = example.meta.get(name)
        if value is not None and not _is_measure(value):
            raise RowError(
                f"the settings of the grader {grader!r} cannot be read: {name!r} must be a number of at least 0, found "
                f"{shown(value)}"
            )
    try:
        fault = reference_fault(example)
    except MissingPackage:
        raise  # no fault of the row
    except (TypeError, ValueError) as error:
        raise RowError(f"the settings of the grader {grader!r} cannot be read: {error}") from error
    if fault:
        raise RowError(fault)
    return example


def _is_measure(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0
