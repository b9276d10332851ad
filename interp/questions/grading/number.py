"""Numbers, compared as exact fractions."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from interp.questions.grading.grade import Grade, Unread, always_told
from interp.questions.grading.normal import plain, tidy
from interp.questions.grading.quantity import Mention, Number, mentions
from interp.questions.grading.statement import READ, Statement, last_sentence, statement_of

__all__ = ["NONE", "Reading", "compared", "judge_number", "read_number", "same"]

NONE = "no number in the answer"


@dataclass(frozen=True)
class Reading:
    """What a text gives as its number.

    Attributes:
        number: by the usual reading; None where there is none.
        perhaps: what it may be as well, or instead.
        why: where there is no single number.
        denied: what the text says that it is not.
    """

    number: Number | None = None
    perhaps: tuple[Number, ...] = ()
    why: str = ""
    denied: tuple[Number, ...] = ()

    @property
    def all(self) -> tuple[Number, ...]:
        """All that it may be."""
        return (*([self.number] if self.number else []), *self.perhaps)


@always_told
def judge_number(
    answer: str, reference: str, *, tolerance: float | int = 0, decimals: int | None = None
) -> Grade:
    """Whether the answer's number equals the reference's exactly.

    A number is read whole: with its sign, scale ("3 million"), percent, unit and bound ("more than 3"), as digits with
    the separators of several countries, as words, and as closed arithmetic (2½, 2³, 3!). Text around it does not
    matter. Units count where both sides have one, and are converted (3 m is 300 cm). A ratio equals ratios only. 50% is
    0.5; where the reference is a percentage, a bare 50 is taken for 50%. An answer with several numbers counts by its
    last sentence, what stands before a reason, or what follows its last "="; it stays ungraded where several are left.
    What may be read in two ways ("1.500", "5K") is right where the usual way is, ungraded where only the other is.

    Args:
        answer, reference: texts.
        tolerance: greatest difference allowed.
        decimals: the reference is rounded to so many; what rounds to it is right.

    Example:
        >>> fl.grading.judge_number("about 1,250 m", "1250").right
        True
        >>> fl.grading.judge_number("thirty-one", "1").right, fl.grading.judge_number("3 m", "3 cm").right
        (False, False)
        >>> fl.grading.judge_number("3.14", "3.14159", decimals=2).right
        True
    """
    wanted = read_number(reference)
    if wanted.number is None:
        return Grade(
            None, why=f"the reference {reference!r} cannot be read as a number: {wanted.why or 'ambiguous'}"
        )
    statement = statement_of(answer)
    allowed = Fraction(str(tolerance)) + (0 if decimals is None else Fraction(1, 2 * 10**decimals))
    if plain(statement.text) == plain(reference) and not statement.exclaimed:
        return Grade(True, statement.text)
    found = read_number(statement.text)
    if statement.exclaimed and found.number:  # "the answer is 5!"
        found = Reading(None, (found.number, *read_number(f"{statement.text}!").all), found.why)
    return compared(found, wanted.number, statement, allowed)


def compared(found: Reading, wanted: Number, statement: Statement, allowed: Fraction = Fraction(0)) -> Grade:
    """The verdict on what was read."""
    shown = found.number.text if found.number else statement.text
    verdicts = [None if n is None else same(n, wanted, allowed) for n in (found.number, *found.perhaps)]
    if verdicts[0]:
        return Grade(True, shown)
    if any(same(number, wanted, allowed) for number in found.denied):
        return Grade(False, shown, "the answer denies the number")
    if found.number is None and not found.perhaps:
        if found.why == NONE and not statement.retracted and not (script := unread_script(statement.text)):
            return Grade(False, statement.text, NONE)
        if found.why == NONE:
            why = (
                "an answer was taken back and none given"
                if statement.retracted
                else f"no number in the {script} text"
            )
            return Grade(None, statement.text, why)
        return Grade(None, statement.text, found.why)
    if any(verdict is None or verdict for verdict in verdicts[1:]) or (found.number and verdicts[0] is None):
        return Grade(
            None, shown, found.why or f"{shown!r} and the reference {wanted.text!r} may be the same or not"
        )
    return Grade(False, shown, found.why)


def same(found: Number, wanted: Number, allowed: Fraction = Fraction(0)) -> bool | None:
    """Whether two numbers are the same quantity; None where they differ by the percent sign alone."""
    if found.parts or wanted.parts:
        return _same_ratio(found, wanted)
    if {found.form, wanted.form} - {"", "%"} and found.form != wanted.form:
        return False
    value, target = found.value, wanted.value
    if found.unit and wanted.unit and found.unit != wanted.unit:
        if found.unit.dimensions != wanted.unit.dimensions:
            return False
        ratio = found.unit.factor / wanted.unit.factor
        value = value * ratio if isinstance(value, Fraction) else value * float(ratio)
    allowed = allowed / 100 if wanted.form == "%" else allowed
    if _close(value, target, allowed) or (
        wanted.form == "%" and not found.form and _close(value / 100, target, allowed)
    ):
        return True
    if found.form == "%" and not wanted.form and _close(value * 100, target, allowed):
        return None
    irrational = isinstance(value, float) != isinstance(target, float)
    try:
        return None if irrational and math.isclose(value, target, rel_tol=1e-12) else False
    except OverflowError:
        return False


def _close(value: Fraction | float, target: Fraction | float, allowed: Fraction) -> bool:
    if isinstance(value, Fraction) and isinstance(target, Fraction):
        return abs(value - target) <= allowed
    both = isinstance(value, float) and isinstance(target, float)
    try:
        return (
            abs(float(value) - float(target))
            <= float(allowed) * (allowed > 0) + 1e-12 * abs(float(target)) * both
        )
    except OverflowError:  # a number of more than 300 digits is no float, and near to none
        return False


def _same_ratio(found: Number, wanted: Number) -> bool:
    if len(found.parts) != len(wanted.parts):
        return False
    halves = [re.sub(r"[^apm]", "", number.text.lower())[:1] for number in (found, wanted)]
    if all(halves) and halves[0] != halves[1]:
        return False
    if found.parts == wanted.parts:
        return True
    clocks = all(re.search(r"\d:\d\d(?!\d)", number.text) for number in (found, wanted))
    if clocks or not (all(found.parts) and all(wanted.parts)):
        return False
    return len({a / b for a, b in zip(found.parts, wanted.parts, strict=True)}) == 1


def read_number(text: str) -> Reading:
    """The one number that a text gives, or why there is none.

    Example:
        >>> from interp.questions.grading.number import read_number
        >>> read_number("She had 9. So 9 * 2 = $18 every day.").number.value, read_number("3 or 4").why
        (Fraction(18, 1), 'several numbers: 3, 4')
    """
    if len(text) > READ:
        return Reading(why=f"an answer of {len(text)} characters is no number")
    text = tidy(text)
    several, many = None, None
    for scope in _scopes(text):
        try:
            found = [mention for mention in mentions(scope) if not mention.negated]
        except Unread as error:  # too many: a part of it may hold one
            many = many or error
            continue
        found = [
            one for place, one in enumerate(found) if not any(_equal(one, other) for other in found[:place])
        ]
        if len(found) == 1:
            one = found[0]
            return Reading(one.sure, one.perhaps, one.why)
        several = several or found
    if many:
        raise many
    if several:
        return Reading(why=f"several numbers: {', '.join(one.text for one in several)}")
    if denied := tuple(one.sure for one in mentions(text) if one.negated and one.sure):
        return Reading(why=f"{text!r} says only what it is not", denied=denied)
    if re.search(
        r"(?i)\bthere (?:is|are|were) (?:no\b|none\b)(?!\w* ?(?:doubt|way|one))", text
    ) and not re.match(r"(?i)no\b", text):
        return Reading(Number(Fraction(0), "no"))
    if re.search(r"\\(?:sqrt|frac|pi|infty)\b|∞|√", text):
        return Reading(why=f"{text!r} is an expression, not a number (the grader 'math' reads it)")
    return Reading(why=NONE)


_LONE = re.compile(r"\W*[-+]?\$?\d[\d.,]*\s*[^\W\d]{0,12}\W*")


def _scopes(text: str) -> list[str]:
    """All of it, and the places where a single number of several is the answer."""
    lone = [line for line in text.split("\n") if _LONE.fullmatch(line)]
    bare = re.sub(r"\([^()]*\)", " ", text)
    reason = re.split(r"(?i)\b(?:because|since|as there)\b|因为|因為", text)[0]
    alone = lone if len(set(lone)) == 1 and not any(one.negated for one in mentions(lone[0])) else []
    return [*alone[:1], text, reason, bare, last_sentence(text), text.rpartition("=")[2]]


def _equal(one: Mention, other: Mention) -> bool:
    if one.sure is None or other.sure is None:
        return one.text == other.text
    return (one.sure.form == other.sure.form or "%" not in one.sure.form + other.sure.form) and bool(
        same(one.sure, other.sure)
    )


def unread_script(text: str) -> str:
    """The script of a text's letters where it is none that number words are known of; "" where it is Latin."""
    letters = [c for c in text if c.isalpha()]
    foreign = [c for c in letters if not unicodedata.name(c, "").startswith("LATIN")]
    return (
        unicodedata.name(foreign[0], "unknown").split()[0].title() if 2 * len(foreign) > len(letters) else ""
    )
