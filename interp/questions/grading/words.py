"""Answers compared as words."""

from __future__ import annotations

import unicodedata

from interp.questions.grading.extract import extract
from interp.questions.grading.grade import Grade

_EDGES = " \t\n\r.,;:!?\"'`*_()[]{}“”‘’"


def judge_exact(answer: str, reference: str) -> Grade:
    """Word for word, nothing extracted: as `interp.questions.tasks.grade`."""
    return Grade(answer.split() == reference.split(), answer)


def judge_text(answer: str, reference: str) -> Grade:
    """Same letters: case, the form of Unicode, and punctuation and spaces at the ends do not count.

    Example:
        >>> fl.grading.judge_text("Red.", "red").right
        True
    """
    if not plain(reference):
        return Grade(None, why=f"the reference {reference!r} holds no text")
    read, _ = extract(answer)
    return Grade(plain(read) == plain(reference), read)


def plain(text: str) -> str:
    """Text as `judge_text` compares it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().strip(_EDGES).split())
