"""The paper's vision-function set (2602.12395): one question about two images, for each of four visual functions.

A folder per function with `data.jsonl` and its images. A row has `id`, `task`, `target_image`, `source_image`,
`prompt` (perhaps behind a literal `<image>`) and the answers in `meta`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hooks.errors import FrankenlensError
from interp.questions.examples import Example
from interp.questions.grading import judge
from interp.questions.readers.pictures import PIXELS, Access, images_of
from interp.questions.readers.report import Failure, ReadReport, RowError, counted
from interp.questions.readers.rows import gradable, text_of, without_markers
from interp.questions.readers.tables import Row, rows_of

PairOfExamples = tuple[Example, Example]


@dataclass(frozen=True)
class _Function:
    """Where a function's answers stand in `meta`, and how they are graded."""

    answer: str
    grader: dict[str, Any]


_HOW = {
    "counting": _Function("{}_answer", {"grader": "number"}),
    "ocr": _Function("{}_text", {"grader": "text"}),
    "grounding": _Function("{}_bbox_xyxy", {"grader": "box"}),
    "recognition": _Function("{}_answer", {"grader": "choice", "choices": ("Yes", "No")}),
}
FUNCTIONS = tuple(_HOW)
BLANK = 8
"""Grey values (of 255) within which an image counts as blank; JPEG makes a blank one uneven by a few."""


def read_vision_functions(
    folder: str | Path,
    functions: Sequence[str] = FUNCTIONS,
    *,
    distinct: bool = True,
    n: int | None = None,
    images_anywhere: bool = False,
    max_pixels: int = PIXELS,
) -> tuple[dict[str, list[PairOfExamples]], dict[str, ReadReport]]:
    """Pairs of every function, and a report on each: see `read_vision_function`.

    Raises:
        FrankenlensError: an unknown function, a folder that is not there, or a function of which no row can be read.
    """
    for function in functions:
        if function not in FUNCTIONS:
            raise FrankenlensError(f"there is no visual function {function!r}, only {', '.join(FUNCTIONS)}")
    how: dict[str, Any] = {"n": n, "images_anywhere": images_anywhere, "max_pixels": max_pixels}
    found = {name: read_vision_function(Path(folder) / name, distinct=distinct, **how) for name in functions}
    return {name: pairs for name, (pairs, _) in found.items()}, {
        name: report for name, (_, report) in found.items()
    }


def read_vision_function(
    path: str | Path,
    *,
    distinct: bool = True,
    n: int | None = None,
    images_anywhere: bool = False,
    max_pixels: int = PIXELS,
) -> tuple[list[PairOfExamples], ReadReport]:
    """Pairs (target, source) of one function, as `interp.localization.vision_swap` takes them with `grade`.

    The graders, in each example's `meta`: counting the number, OCR the text (case and punctuation at its ends aside),
    grounding a box that overlaps the example's own by an IoU above 0.5, recognition Yes or No. So an answer that is
    right for the *source* is, for grounding, one that overlaps the source's box.

    Args:
        path: a function's folder, or its `data.jsonl`.
        distinct: leave out pairs for which one answer is right for both images and which can show no change (the full
            set has 8 in OCR); the paper keeps them.
        n: at most so many pairs, the first; no images of others are decoded.
        images_anywhere, max_pixels: as in `read_jsonl`.

    Returns:
        The pairs, and a report with the rows that are not among them, and notes on what holds of all that are.

    Raises:
        FrankenlensError: no such file, or no row that can be read.
    """
    path = Path(path) / "data.jsonl" if os.path.isdir(path) else Path(path)
    access = Access(images_anywhere, max_pixels)
    rows, failures = rows_of(path)
    n_rows = len(rows) + len(failures)
    pairs: list[PairOfExamples] = []
    passed: dict[str, int] = {}
    used: dict[str, int] = {}
    remarks: Counter[str] = Counter()
    same = 0
    for tried, (number, row) in enumerate(rows):
        if n is not None and len(pairs) == n:
            passed = {f"beyond the first {n} (--n)": len(rows) - tried}
            break
        try:
            name = text_of(row, "id")
            if used.setdefault(name, number) != number:
                raise RowError(
                    f"the id {name!r} is that of row {used[name]}, too; give each row an id of its own"
                )
            pair = _pair(name, number, row, path.parent, remarks, access)
            reason = _indistinct(*pair)
            if reason and distinct:
                raise RowError(reason)
        except RowError as error:
            failures.append(Failure(number, str(error)))
            continue
        same += bool(reason)
        pairs.append(pair)
    failures.sort(key=lambda failure: failure.row)
    if not pairs:
        raise FrankenlensError(f"no row of {path} can be read; row {failures[0].row}: {failures[0].reason}")
    notes = (*_notes(pairs, same), *counted(remarks))
    return pairs, ReadReport(str(path), n_rows, len(pairs), tuple(failures), notes, passed)


def _pair(name: str, n: int, row: Row, root: Path, remarks: Counter[str], access: Access) -> PairOfExamples:
    function = str(row.get("task"))
    if function not in _HOW:
        raise RowError(f"the field 'task' is {row.get('task')!r}, not one of {', '.join(FUNCTIONS)}")
    known = row.get("meta")
    if not isinstance(known, dict):
        raise RowError("the field 'meta' must hold an object with the answers")
    question = without_markers(text_of(row, "prompt"), 1)
    how, both = _HOW[function], []
    for side in ("target", "source"):
        images, said = images_of([row.get(f"{side}_image")], root, access)
        remarks.update(said)
        meta = {
            **how.grader,
            "row": n,
            "side": side,
            **{k: v for k, v in known.items() if k == "object_name"},
        }
        if how.grader["grader"] == "box":
            meta["iou"] = known.get("iou_threshold", 0.5)
        answer = _answer(known, how.answer.format(side))
        identity = name if side == "target" else f"{name}-source"
        both.append(gradable(Example(identity, images, question, answer, function, meta=meta)))
    return both[0], both[1]


def _answer(known: dict[str, Any], field: str) -> str:
    value = known.get(field)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return text_of(known, field)


def _indistinct(target: Example, source: Example) -> str:
    """Why one answer is right for both images; "" where none is."""
    if judge(target.answer, source).right is False and judge(source.answer, target).right is False:
        return ""
    if target.meta["grader"] == "box":
        return f"the boxes of both images overlap: {target.answer} and {source.answer}"
    return f"both images have the same answer, {target.answer!r}"


def _notes(pairs: Sequence[PairOfExamples], same: int) -> tuple[str, ...]:
    notes = [f"{same} pairs have one answer that is right for both images"] if same else []
    if len(pairs) > 1:
        for side in (0, 1):
            answers = {pair[side].answer for pair in pairs}
            if len(answers) == 1:
                who = ("target", "source")[side]
                notes.append(f"every {who} has the same answer, {answers.pop()!r}")
    blank = sum(_is_blank(source.images[0]) for _, source in pairs)
    if blank:
        notes.append(f"{blank} of {len(pairs)} source images are blank")
    sizes = sum(target.images[0].size != source.images[0].size for target, source in pairs)
    if sizes:
        notes.append(f"in {sizes} of {len(pairs)} pairs the images differ in size")
    return tuple(notes)


def _is_blank(image: Image.Image) -> bool:
    extrema = image.convert("L").getextrema()
    return float(extrema[1]) - float(extrema[0]) <= BLANK  # type: ignore[arg-type]
