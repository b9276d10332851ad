"""Answers compared as words."""

from __future__ import annotations

import re
import unicodedata

from interp.questions.grading.grade import Grade, always_told
from interp.questions.grading.normal import plain
from interp.questions.grading.statement import Statement, statement_of

_EDGES = " \t\n\r.,;:!?\"'`*_()[]{}"
ARTICLE = re.compile(r"(?:an?|the)\s+")
_PHRASES = re.compile(
    r"(?:(?:it|this|that|there|he|she|they|these)(?:'s| is| are| was| were| says| reads| shows)"
    r"|(?:the|this) \w+(?: \w+){0,4}? (?:is|are|was|says|reads|shows|would be)"
    r"|i (?:see|think it is|think it's|believe it is|would say)|是|为|這是|这是|이것은)[\s:]*"
)


@always_told
def judge_exact(answer: str, reference: str) -> Grade:
    """Word for word, nothing extracted: as `interp.questions.tasks.grade`."""
    return Grade(answer.split() == reference.split(), answer)


@always_told
def judge_text(answer: str, reference: str) -> Grade:
    """Same letters: case, the form of Unicode and LaTeX, and punctuation and spaces at the ends do not count.

    A reference that stands inside a longer sentence is neither right nor wrong: the sentence may say the contrary.

    Example:
        >>> fl.grading.judge_text("Red.", "red").right, fl.grading.judge_text("Answer: Dr. Smith", "Dr. Smith").right
        (True, True)
        >>> fl.grading.judge_text("The sign on the left has red letters", "red").right is None
        True
    """
    wanted = bare(reference)
    if not wanted:
        return Grade(None, why=f"the reference {reference!r} holds no text")
    statement = statement_of(answer)
    read = bare(statement.text)
    if wanted in (read, bare(plain_sentence(read)), bare(_quoted(statement.text))):
        return Grade(True, statement.text)
    if not ARTICLE.match(wanted) and ARTICLE.sub("", bare(plain_sentence(read)), count=1) == wanted:
        return Grade(True, statement.text)
    return _not_the_same(statement, read, wanted)


def _not_the_same(statement: Statement, read: str, wanted: str) -> Grade:
    if statement.retracted and not read:
        return Grade(None, statement.text, "an answer was taken back and none given")
    longer = len(read.split()) > len(wanted.split()) + 2 or (len(read) > len(wanted) and not read.isascii())
    if longer and holds(read, wanted):
        return Grade(None, statement.text, f"the reference {wanted!r} stands within a longer answer")
    return Grade(False, statement.text)


def bare(text: str) -> str:
    """Text as `judge_text` compares it."""
    return " ".join(unicodedata.normalize("NFKC", plain(text)).casefold().strip(_EDGES).split())


def plain_sentence(text: str) -> str:
    """A text (as `bare` leaves it) without the words that introduce an answer: "it is a cat" is "a cat"."""
    text = _PHRASES.sub("", text, count=1) if _PHRASES.match(text) else text
    return re.sub(r"\s*(?:です|だ|입니다|이다|的)$", "", text)


def holds(text: str, part: str) -> bool:
    """Whether a text holds a part as whole words; scripts without spaces hold it anywhere."""
    edge = r"(?<![^\W一-鿿぀-ヿ가-힣])", r"(?![^\W一-鿿぀-ヿ가-힣])"
    return bool(part) and re.search(f"{edge[0]}{re.escape(part)}{edge[1]}", text) is not None


def _quoted(text: str) -> str:
    """What a text puts between quotation marks, if it is one thing."""
    quoted = set(re.findall(r'"([^"]+)"', plain(text)))
    return quoted.pop() if len(quoted) == 1 else ""
