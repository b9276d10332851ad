"""Numbers, compared as exact fractions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from interp.questions.grading.extract import extract, last_sentence
from interp.questions.grading.grade import Grade

WORDS: tuple[str, ...] = tuple(
    (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty"
    ).split()
)
Unit = Literal["", "%", ":"]

_CHUNK = re.compile(
    r"(?<![\w^_])(?P<chunk>[-+]?\.?\d(?:[\w.,:/]|(?<=\d[eE])[-+](?=\d))*)(?P<percent>\s*(?:%|percent\b))?(?P<power>\^)?"
)
_DECIMAL = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
_SHAPE = re.compile(rf"(?P<a>{_DECIMAL})(?:(?P<sign>[/:])(?P<b>{_DECIMAL}))?(?P<tail>[^\W\d_]*)")
_EXPRESSION = re.compile(r"\\(?!text|mathrm|mathbf|textbf|left|right|quad)[A-Za-z]+|[√π∛]|\bsqrt\b|\bpi\b")
_LATEX = (
    ("−", "-"),
    (r"\\[!,;]\s*(?=\d{3}(?!\d))", ""),  # 10\,080 and 10,\! 080
    (r"\\([%$])", r"\1"),
    (r"\^?\{?\\circ\}?|°", ""),
    (r"(\d)?\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1 \2/\3"),
    (r"(\d)?\s*\\[dt]?frac\s*(\d)\s*(\d)", r"\1 \2/\3"),
    (r"\s*(?:×|\\times|\*|\bx)\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?", r"e\1"),
    (r"(^|[=(:$]\s*)-\s+(?=[\d.])", r"\1-"),
)


@dataclass(frozen=True)
class Number:
    """A number as it was written: its value ("50%" is 1/2, "1:3" is 1/3) and whether it is a percentage or a ratio."""

    value: Fraction
    unit: Unit
    text: str


def judge_number(
    answer: str, reference: str, *, tolerance: float | int = 0, decimals: int | None = None
) -> Grade:
    """Whether the answer's number equals the reference's exactly.

    Thousands separators, fractions, mixed numbers, powers of ten and number words up to twenty are read; text around
    the number does not matter. A ratio equals ratios only. 50% is 0.5; where the reference is a percentage, a bare 50
    is taken for 50%. An answer with several numbers counts by its last sentence and what follows its last "=", and
    stays ungraded where several are left.

    Args:
        answer, reference: texts.
        tolerance: greatest difference allowed.
        decimals: the reference is rounded to so many; what rounds to it is right.

    Example:
        >>> fl.grading.judge_number("about 1,250 m", "1250").right
        True
        >>> fl.grading.judge_number("3.14", "3.14159", decimals=2).right
        True
    """
    wanted = read_number(reference)
    if not isinstance(wanted, Number):
        return Grade(None, why=f"the reference {reference!r} cannot be read as a number: {wanted}")
    read, _ = extract(answer)
    found = read_number(read)
    if not isinstance(found, Number):
        return Grade(False if found == NONE else None, read, found)
    if (found.unit == ":") != (wanted.unit == ":"):
        return Grade(False, found.text)
    allowed = Fraction(str(tolerance)) + (0 if decimals is None else Fraction(1, 2 * 10**decimals))
    readings = [found.value, found.value / 100] if wanted.unit == "%" and found.unit == "" else [found.value]
    allowed = allowed / 100 if wanted.unit == "%" else allowed
    if any(abs(value - wanted.value) <= allowed for value in readings):
        return Grade(True, found.text)
    if found.unit == "%" and wanted.unit == "" and abs(found.value * 100 - wanted.value) <= allowed:
        return Grade(
            None, found.text, f"{found.text} and the reference {reference} differ by the percent sign alone"
        )
    return Grade(False, found.text)


NONE = "no number in the answer"


def read_number(text: str) -> Number | str:
    """The one number that a text gives, or why there is none."""
    text = _without_latex(text)
    if _EXPRESSION.search(text):
        return f"{text!r} is an expression, not a number (the grader 'math' reads it)"
    found: list[Number | str] = []
    for scope in (text, last_sentence(text), text.rpartition("=")[2]):
        inside = _numbers(scope)
        found = inside or found
        if len({(n.value, n.unit) if isinstance(n, Number) else n for n in inside}) == 1:
            return inside[0]
    if not found:
        words = [word for word in re.findall(r"[a-z]+", text.casefold()) if word in WORDS]
        if len(set(words)) > 1:
            return f"several numbers: {', '.join(dict.fromkeys(words))}"
        return Number(Fraction(WORDS.index(words[0])), "", words[0]) if words else NONE
    return f"several numbers: {', '.join(n.text if isinstance(n, Number) else n for n in found)}"


def _numbers(text: str) -> list[Number | str]:
    return [_number(match) for match in _CHUNK.finditer(text)]


def _number(match: re.Match[str]) -> Number | str:
    chunk = match["chunk"].rstrip(".,:/")
    shape = _SHAPE.fullmatch(chunk)
    if shape is None or shape["tail"] in ("x", "y", "z", "n") or (match["power"] and not shape["tail"]):
        return f"{match[0]!r} is no number"
    value, sign = _fraction(shape["a"]), shape["sign"]
    if sign:
        below = _fraction(shape["b"])
        if below == 0:
            return f"{chunk!r} divides by 0"
        value /= below
    if match["percent"]:
        return Number(value / 100, "%", match[0].strip())
    return Number(value, ":" if sign == ":" else "", chunk)


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _without_latex(text: str) -> str:
    for pattern, plain in _LATEX:
        text = re.sub(pattern, plain, text)
    return re.sub(r"(?<![\w.,/^])([-+]?)(\d+)\s+(\d+)/(\d+)(?![\w/])", _improper, text)


def _improper(match: re.Match[str]) -> str:
    sign, whole, above, below = match[1], *map(int, match.groups()[1:])
    return f"{sign}{whole * below + above}/{below}"
