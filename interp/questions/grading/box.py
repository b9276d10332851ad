"""Bounding boxes, compared by their intersection over union."""

from __future__ import annotations

import re

from interp.questions.grading.grade import Grade, always_told
from interp.questions.grading.normal import normal
from interp.questions.grading.statement import statement_of

Box = tuple[float | int, float | int, float | int, float | int]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_BETWEEN = r"[\s,;()\[\]]+"
_RUN = re.compile(rf"(?<![\w.]){_NUMBER}(?:{_BETWEEN}{_NUMBER})*")
_CORNERS = {  # names of the sides, in the order x1, y1, x2, y2
    **dict.fromkeys(("x1", "xmin", "left", "x"), 0),
    **dict.fromkeys(("y1", "ymin", "top", "y"), 1),
    **dict.fromkeys(("x2", "xmax", "right", "w", "width"), 2),
    **dict.fromkeys(("y2", "ymax", "bottom", "h", "height"), 3),
}
_NAMED = re.compile(
    rf"[\"']?\b(?P<name>[a-z]+_?\{{?[12]?(?:min|max)?\}}?)[\"']?\s*[=:]\s*(?P<value>{_NUMBER})", re.I
)


@always_told
def judge_box(answer: str, reference: str, threshold: float = 0.5) -> Grade:
    """Whether the answer's box and the reference's overlap by an IoU above the threshold.

    Boxes are (x1, y1, x2, y2), both in the units of the reference: an answer in thousandths of the image is to be
    brought to its pixels first.

    Example:
        >>> fl.grading.judge_box("[10, 10, 50, 50]", "12,10,52,50").right
        True
    """
    wanted = boxes_in(reference)
    if len(wanted) != 1 or _area(wanted[0]) <= 0:
        return Grade(
            None, why=f"the reference {reference!r} is not one box x1,y1,x2,y2 with x1 < x2 and y1 < y2"
        )
    read = statement_of(answer).text
    found = boxes_in(read)
    if not found:
        longest = max(map(len, _runs(read)), default=0)
        if longest > 4:
            return Grade(None, read, f"the answer holds {longest} numbers in a row, not the 4 of a box")
        return Grade(False, read, "no box x1,y1,x2,y2 in the answer")
    if len(found) > 1:
        return Grade(None, read, f"the answer holds {len(found)} different boxes")
    if _area(found[0]) <= 0:
        return Grade(False, read, "the answer's box is empty (x1 >= x2 or y1 >= y2)")
    return Grade(iou(found[0], wanted[0]) > threshold, read)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where either is empty.

    Example:
        >>> fl.grading.iou((0, 0, 2, 2), (1, 0, 3, 2))
        0.3333333333333333
    """
    if _area(a) <= 0 or _area(b) <= 0:
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (_area(a) + _area(b) - shared)


def boxes_in(text: str) -> list[Box]:
    """The different boxes of a text: runs of four numbers, or of several times four, brackets and commas between."""
    found: list[Box] = []
    for run in (run for run in _runs(text) if len(run) % 4 == 0):
        found += [(run[i], run[i + 1], run[i + 2], run[i + 3]) for i in range(0, len(run), 4)]
    return list(dict.fromkeys(found))


def _runs(text: str) -> list[list[float]]:
    text = normal(text)
    if named := _named(text):
        return named
    return [[float(number) for number in re.findall(_NUMBER, run)] for run in _RUN.findall(text)]


def _named(text: str) -> list[list[float]]:
    """Boxes whose sides have names, in any order; of (x, y, width, height) the corners."""
    sides = [(re.sub(r"[_{}]", "", m["name"].lower()), float(m["value"])) for m in _NAMED.finditer(text)]
    sides = [(name, value) for name, value in sides if name in _CORNERS]
    found = []
    for start in range(0, len(sides) - 3, 4):
        four = sides[start : start + 4]
        box = {_CORNERS[name]: value for name, value in four}
        if sorted(box) != [0, 1, 2, 3]:
            return []
        measured = any(name[0] in "wh" for name, _ in four)
        found.append([box[0], box[1], box[2] + measured * box[0], box[3] + measured * box[1]])
    return found


def _area(box: Box) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1])) if box[0] < box[2] and box[1] < box[3] else 0.0
