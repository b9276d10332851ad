r"""The answer in free text: `\boxed{...}`, `<answer>...</answer>`, `#### ...`, "the answer is ...", else all of it."""

from __future__ import annotations

import re

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_HASHES = re.compile(r"####\s*([^\n]+)")
_STATED = re.compile(r"\banswer\s*(?:is|:|=)[\s:*_]*(?P<answer>[^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def extract(text: str) -> tuple[str, bool]:
    """The last statement of an answer, whole, and whether there was one; without one, the text itself.

    Nothing inside the statement is searched: "3.5" stays "3.5", "1:3" stays "1:3".

    Example:
        >>> fl.grading.extract("2 + 1 = 3, so the answer is 3.")
        ('3', True)
    """
    text = text.rpartition("</think>")[2]
    if (inside := boxed(text)) is not None:
        return inside.strip(), True
    for pattern in (_TAGGED, _HASHES):
        if found := pattern.findall(text):
            return found[-1].strip(), True
    if stated := list(_STATED.finditer(text)):
        return _until_sentence_ends(stated[-1]["answer"]), True
    return text.strip(), False


def boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` (or `\fbox{...}`) holds, braces balanced; None where there is none."""
    for opening in reversed(list(re.finditer(r"\\boxed\s*\{|\\fbox\s*\{", text))):
        depth, at = 1, opening.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
            at += 1
        if not depth:
            return text[opening.end() : at - 1]
    return None


def last_sentence(text: str) -> str:
    """The last sentence of a text; a point within a number ends none."""
    lines = [line for line in text.strip().split("\n") if line.strip()]
    pieces = [piece for piece in re.split(r"(?<=[.!?])\s+", lines[-1]) if piece.strip()] if lines else []
    return pieces[-1] if pieces else ""


def _until_sentence_ends(text: str) -> str:
    end = _SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).strip().strip("*_").strip()
