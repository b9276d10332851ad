"""Mathematics: lists, intervals and numbers part by part, expressions as math-verify reads them."""

from __future__ import annotations

import re

from hooks.extras import require_installed
from interp.questions.grading.apart import within
from interp.questions.grading.equality import MATHEMATICS, equal, holds_words
from interp.questions.grading.grade import Grade, always_told
from interp.questions.grading.normal import normal, plain
from interp.questions.grading.statement import statement_of
from interp.questions.grading.symbols import Unparsed
from interp.questions.grading.units import unit_of

LONGEST = 1000  # characters of mathematics
DEEPEST = 200  # brackets and signs, each of which may lie within the others
TIMEOUT = 5  # seconds, whole ones: math-verify's alarm counts no others

_DELIMITED = re.compile(r"\$\$.+?\$\$|(?<!\\)\$(?=\S)[^$\n]*?\S\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
_JOINED = re.compile(r"[\s,;]*(?:and|or|和|或)?\s*", re.I)
_NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?:real |integer )?solutions?|\\varnothing|\\\{\s*\\\}", re.I
)


@always_told
def judge_math(answer: str, reference: str, timeout: int = TIMEOUT) -> Grade:
    r"""Whether answer and reference are equal as mathematics; both may be LaTeX, with or without `$`.

    Lists, sets, tuples, intervals and `\pm` are compared element by element, numbers as `judge_number` does, with
    their units, words as words, all else as math-verify reads it: exactly, or to the decimals that are written where
    there are six of them. `x = 5` is 5, 45° is 45; where the reference is 50%, 50 and 0.5 are taken for it. What
    cannot be read whole, is rounded to fewer decimals or takes too long is ungraded; expressions are worked out in a
    process of their own (`interp.questions.grading.apart`), which is ended then.

    Raises:
        MissingPackage: math-verify is not installed.
    """
    require_installed('the grader "math"', "math_verify")
    wanted = _cleaned(reference)
    if not re.search(r"\w|\\[a-zA-Z]+|\\?[{\[(]", wanted):
        return Grade(None, why=f"the reference {reference!r} cannot be read as mathematics")
    statement = statement_of(answer)
    read = _mathematics_in(statement.text)
    if not read.strip():
        why = "an answer was taken back and none given" if statement.retracted else "no answer"
        return Grade(None if statement.retracted else False, read, why)
    if len(read) > LONGEST or _depth(read) > DEEPEST:
        return Grade(
            None, read, f"an answer of {len(read)} characters, or of so many brackets, is not worked out"
        )
    try:
        with within(timeout + 1.0):
            right = equal(_cleaned(read), wanted, timeout)
            if statement.exclaimed and right != equal(_cleaned(f"{read}!"), wanted, timeout):
                right = None
    except Unparsed as error:
        return Grade(None, read, str(error))
    if right is None:
        return Grade(None, read, f"{read!r} and the reference {reference!r} may be the same or not")
    if not right and statement.retracted and not MATHEMATICS.search(normal(read)):
        return Grade(None, read, "an answer was taken back and none given")
    return Grade(right, read)


def _depth(text: str) -> int:
    return max(text.count(bracket) for bracket in "([{^-")


def _mathematics_in(text: str) -> str:
    """The last mathematics that delimiters set apart in prose, with what is joined to it; all of it without any."""
    found = list(_DELIMITED.finditer(text))
    if not found or not holds_words(_DELIMITED.sub(" ", text)):
        return text
    start = len(found) - 1
    while start and _JOINED.fullmatch(text[found[start - 1].end() : found[start].start()]):
        start -= 1
    behind = text[found[-1].end() :]
    unit = re.match(r"\s*[A-Za-z°]+(?:\^\{?\d\}?|/[A-Za-z]+)?", behind)
    end = found[-1].end() + (unit.end() if unit and unit_of(plain(unit[0])) else 0)
    return text[found[start].start() : end]


def _cleaned(text: str) -> str:
    text = normal(text).strip().rstrip(".").strip()
    text = re.sub(r"(?i)\binfinity\b", r"\\infty", text)
    return r"\emptyset" if _NOTHING.fullmatch(text) else text
