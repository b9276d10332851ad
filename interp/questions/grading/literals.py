"""A number as digits are written in several countries: 1,234.5 · 1.234,5 · 1 234,5 · 1'234.5 · 12,34,567."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 400
"""Characters of a number that is read."""

LITERAL = (
    r"(?:\d{1,3}(?: \d{3})+(?:[.,]\d+)?(?![\d]| \d{3})|\d(?:[\d.,']*\d)?)(?:[eE][-+]?\d{1,3}(?![\d]))?"
    r"|\.\d+(?:[eE][-+]?\d{1,3})?"
)

_EXPONENT = r"(?P<e>[eE][-+]?\d{1,3})?"
_SURE = (  # pattern, what separates groups, what separates decimals
    (re.compile(rf"(?:\d+(?:\.\d*)?|\.\d+){_EXPONENT}"), "", "."),
    (re.compile(rf"\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?{_EXPONENT}"), ",", "."),
    (re.compile(rf"\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?:\.\d+)?{_EXPONENT}"), ",", "."),
    (re.compile(rf"\d{{1,3}}(?:'\d{{3}})+(?:\.\d+)?{_EXPONENT}"), "'", "."),
    (re.compile(rf"\d{{1,3}}(?: \d{{3}})+(?:\.\d+)?{_EXPONENT}"), " ", "."),
    (re.compile(r"\d{1,3}(?:\.\d{3})+,\d+"), ".", ","),
    (re.compile(r"\d{1,3}(?: \d{3})+,\d+"), " ", ","),
    (re.compile(r"\d{1,3}(?:\.\d{3}){2,}"), ".", ","),
)
_PERHAPS = (
    (re.compile(r"[1-9]\d{0,2}\.\d{3}"), ".", ","),  # 1.500 may be 1500, elsewhere
    (re.compile(r"\d+,\d+"), "", ","),  # 3,5 may be 3.5
)


def readings(literal: str) -> tuple[list[Fraction], list[Fraction]]:
    """The values that digits with separators have by the English habit, and those that they may have elsewhere.

    Example:
        >>> from interp.questions.grading.literals import readings
        >>> readings("1,234.5"), readings("3,5"), readings("1.2.3")
        (([Fraction(2469, 2)], []), ([], [Fraction(7, 2)]), ([], []))
    """
    if len(literal) > LONGEST:
        return [], []
    sure, perhaps = (
        list(
            dict.fromkeys(
                Fraction(
                    literal.replace(group, "").replace(point, ".") if group else literal.replace(point, ".")
                )
                for pattern, group, point in patterns
                if pattern.fullmatch(literal)
            )
        )
        for patterns in (_SURE, _PERHAPS)
    )
    return sure[:1], [value for value in perhaps if value not in sure[:1]]
