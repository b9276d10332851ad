r"""What a mathematical text is made of at its top: one expression, or a list, set, tuple, interval of several."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["one", "list", "set", "ordered"]

_NAME = r"[A-Za-z](?:_\{?\w+\}?|')?(?:\([a-z]\))?|\\[a-z]+"
_NAMED = re.compile(rf"\s*(?P<name>{_NAME})\s*(?:=|\\in\b)\s*(?P<rest>[^=<>]+)")
_WORDS = re.compile(r"(?:,\s*)?(?:\band\b|\bor\b|\\lor\b|\\vee\b|和|或)", re.I)
_CLOSES = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Parts:
    """A text in parts.

    Attributes:
        kind: "list" has no brackets and no order, like "set"; "ordered" is a tuple, a point, an interval.
        parts: one for "one".
        brackets: of "ordered", e.g. "[)".
        union: it is joined by set operations or relations, which the parts do not show.
    """

    kind: Kind
    parts: tuple[str, ...]
    brackets: str = ""


def parts_of(text: str) -> Parts:
    r"""The parts of a text without LaTeX's typography.

    Example:
        >>> from interp.questions.grading.structure import parts_of
        >>> parts_of(r"\pm 2").parts, parts_of("x = 1 or x = -2").parts, parts_of("[1, 2)").brackets
        (('+2', '-2'), ('x = 1', 'x = -2'), '[)')
    """
    text = text.strip()
    if text.count(r"\pm") == 1 and "," not in text:
        before, _, behind = text.partition(r"\pm")
        return Parts("list", tuple(f"{before.strip()}{sign}{behind.strip()}" for sign in "+-"))
    text = re.sub(r"^\{(.*)\}$", r"\\{\1\\}", text) if "," in text else text
    inner, brackets = _unwrapped(text)
    spaced = bool(re.search(r",\s|;", inner)) and not brackets
    parts = _split(_WORDS.sub(",", inner) if not brackets else inner, spaced)
    if brackets in ("{}",):
        return Parts("set", tuple(parts) if inner.strip() else ())
    if brackets and len(parts) > 1:
        return Parts("ordered", tuple(parts), brackets)
    return Parts("list", tuple(parts)) if len(parts) > 1 and not brackets else Parts("one", (text,))


def unnamed(text: str) -> tuple[str, str]:
    r"""The name that a text gives to a value (`x = 5`, `x \in [1, 2]`), and the value; without a name, "" and all.

    Example:
        >>> from interp.questions.grading.structure import unnamed
        >>> unnamed("x_1 = 5"), unnamed("2x + y = 3"), unnamed("n=2, 3")
        (('x_1', '5'), ('', '2x + y = 3'), ('n', '2, 3'))
    """
    match = _NAMED.fullmatch(text)
    return (re.sub(r"[{}\s]", "", match["name"]), match["rest"].strip()) if match else ("", text.strip())


def _unwrapped(text: str) -> tuple[str, str]:
    r"""The inside of the brackets around all of a text, and the brackets; the text and "" where there are none."""
    opening = re.match(r"\\?[\[({]", text)
    closing = re.search(r"\\?[\])}]$", text)
    if opening is None or closing is None or opening[0] == "{" or closing[0] == "}":
        return text, ""
    depth = 0
    for at, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and at < len(text) - 1 and c in ")]}":
            return text, ""
    pair = opening[0][-1] + closing[0][-1]
    if "{" in pair and pair != "{}":
        return text, ""
    return text[opening.end() : closing.start()], pair


def _split(text: str, spaced: bool) -> list[str]:
    """At commas and semicolons outside brackets; where some have a space behind them, "1,000" is one number."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        thousands = (
            spaced and c == "," and re.match(r",\d{3}(?!\d)", text[at:]) and text[at - 1 : at].isdigit()
        )
        if c in ",;" and depth == 0 and not thousands:
            parts.append(text[start:at].strip())
            start = at + 1
    return [part for part in [*parts, text[start:].strip()] if part]
