"""Words before and behind a number that make it a bound ("more than 3", "3 or more"), deny it, or leave it vague."""

from __future__ import annotations

import re
from typing import Literal

Form = Literal["", "%", ":", "<", "<=", ">", ">=", "!="]

_BOUNDS: tuple[tuple[str, Form], ...] = (
    (
        r"(?:no|not) (?:more|greater|larger|higher) than|(?:less|fewer|smaller) than or equal to|at most|up to|"
        r"(?<![-=])<=|maximum of|最多|不超过|至多",
        "<=",
    ),
    (
        r"(?:no|not) (?:less|fewer|smaller|lower) than|(?:more|greater|larger) than or equal to|at least|"
        r"(?<![-=])>=|minimum of|至少|最少|不少于",
        ">=",
    ),
    (r"(?:less|fewer|smaller|lower|shorter) than|under|below|(?<![-=])<|少于|小于|不到|低于|不足", "<"),
    (
        r"(?:more|greater|larger|higher|bigger|longer) than|over|above|exceed(?:s|ing)?|(?<![-=])>"
        r"|超过|不止|大于|多于|高于",
        ">",
    ),
    (r"!=|different from", "!="),
)
_BEFORE: tuple[tuple[re.Pattern[str], Form], ...] = tuple(
    (re.compile(rf"(?:{words})\s*(?:the |a total of )?$", re.I), form) for words, form in _BOUNDS
)
_BEHIND: tuple[tuple[re.Pattern[str], Form], ...] = (
    (
        re.compile(
            r"\s*(?:\w+ )?(?:or (?:more|above|greater|higher)|at least|minimum)\b|\s*<=?\s*[a-z]|\+(?!\s*[\d(])|"
            r"\s*plus\b|\s*[个個]?以上|[多余餘][个個]?",
            re.I,
        ),
        ">=",
    ),
    (
        re.compile(
            r"\s*(?:\w+ )?(?:or (?:less|fewer|below)|at most|max(?:imum)?)\b|\s*>=?\s*[a-z]|\s*[个個]?以[下内]",
            re.I,
        ),
        "<=",
    ),
)
NOT = re.compile(
    r"(?:\b(?:not|never|cannot be|rather than|instead of|except|excluding|nor|neither)|n't(?: be| have)?"
    r"|不是|并非|没有|不等于)"
    r"\s*(?:be |equal to |exactly |just |only |really )?$",
    re.I,
)
NEARLY = re.compile(r"\b(?:nearly|almost|close to|just under|just over)\s*$|接近$|将近$", re.I)


def bound_of(before: str, behind: str) -> Form:
    """The sign of the bound that the texts before and behind a number make of it; "" where they make none."""
    for pattern, form in _BEFORE:
        if pattern.search(before):
            return form
    for behind_it, form in _BEHIND:
        if behind_it.match(behind):
            return form
    return ""
