"""What the readers share: from a row's fields to text, and to an example that can be graded."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from hooks.errors import one_line
from hooks.extras import MissingPackage
from interp.questions.examples import Example
from interp.questions.grading import GRADERS, reference_fault
from interp.questions.grading.settings import NUMBERS, setting_fault
from interp.questions.readers.report import RowError, shown
from interp.questions.readers.tables import Row

IMAGE_MARKER = "<image>"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def text_of(row: Row, name: str) -> str:
    """A field's text; a number is written out.

    Raises:
        RowError: there is none, or what no tokenizer or file could hold.
    """
    value = row.get(name)
    if _is_number(value):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"the field {name!r} must hold text, found {shown(value)}")
    if (found := _NO_TEXT.search(value)) is not None:
        raise RowError(f"the field {name!r} holds {_named(found[0])}: {shown(value)}")
    return value


def text_if_any(row: Row, name: str) -> str | None:
    """A field's text; None where the row has none, or an empty one."""
    return None if row.get(name) in (None, "") else text_of(row, name)


def _named(character: str) -> str:
    """What `_NO_TEXT` found."""
    if character == "\0":
        return "a NUL, which is no text"
    if "\udc80" <= character <= "\udcff":  # a byte that `interp.questions.readers.tables` could not decode
        return (
            f"the byte 0x{ord(character) - 0xDC00:02x}, which is not of the file's encoding (name that: --encoding "
            'gbk, in Python encoding="gbk"; or save the file as UTF-8)'
        )
    return "half of a surrogate pair, which is no character"


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
    for choice in choices:
        text_of({"choices": choice}, "choices")
    if grader is not None and (not isinstance(grader, str) or grader not in GRADERS):
        raise RowError(f"there is no grader {shown(grader)}, only {', '.join(GRADERS)}")
    for name in NUMBERS:
        value = example.meta.get(name)
        if value is not None and (fault := setting_fault(name, value)):
            raise RowError(f"the settings of the grader {grader!r} cannot be read: {fault}")
    try:
        fault = reference_fault(example)
    except MissingPackage:
        raise  # no fault of the row
    except Exception as error:
        raise RowError(f"the settings of the grader {grader!r} cannot be read: {one_line(error)}") from error
    if fault:
        raise RowError(fault)
    return example


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, (float, Decimal)) and math.isfinite(value)
