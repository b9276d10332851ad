"""When two mathematical texts are the same: words, numbers, numerals in a base, parts, and then expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from interp.questions.grading.apart import equal_expressions
from interp.questions.grading.normal import normal, plain
from interp.questions.grading.number import read_number, same
from interp.questions.grading.quantity import Number, mentions
from interp.questions.grading.structure import Parts, parts_of, unnamed
from interp.questions.grading.symbols import Unparsed, within_places
from interp.questions.grading.units import unit_of
from interp.questions.grading.words import bare, holds, plain_sentence

Verdict = bool | None | Literal["untold"]
UNTOLD: Literal["untold"] = "untold"

MATHEMATICS = re.compile(r"[\d+*/=<>^_|√]|\\[A-Za-z]+|(?<![A-Za-z'])[b-hj-z](?![A-Za-z'])")
_FUNCTIONS = (
    r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|cbrt|min|max|gcd|lcm|mod|det|lim|overline|or|and|in|pi|"
    r"alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|psi|omega|sigma|rho|tau|infty|cup|cap|setminus|emptyset|"
    r"mathbb|"
    r"begin|end|[pbv]?matrix|binom|lfloor|rfloor|lceil|rceil|langle|rangle|vert|to|frac|prime|angle|triangle|pmod|"
    r"bmod|forall|"
    r"exists|equiv|perp|parallel|vec|hat|bar|cdots"
)
_WORD = re.compile(rf"(?<![A-Za-z])(?!(?:{_FUNCTIONS})(?![A-Za-z]))[A-Za-zÀ-ɏ]{{3,}}|[^\W\d_a-zA-ZÀ-ɏͰ-Ͽ]")
_MONTH = re.compile(r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b", re.I)
_BASE = re.compile(r"\(?(?P<digits>[0-9A-Za-z]+)\)?_\{?(?P<base>\d+)\}?")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|cup|cap|in|setminus|mathbb)(?![a-z])")
_MANY = re.compile(r"\\ldots|\\forall|\\exists")
_UNIT = re.compile(
    r"^(?P<value>.*[\d)}\]])\s?(?P<unit>[A-Za-z°$]+(?:\^\{?\d\}?)?(?:/[A-Za-z]+(?:\^\{?\d\}?)?)?)$", re.DOTALL
)


def equal(found: str, wanted: str, timeout: int) -> bool | None:
    """Whether two texts (as `normal` leaves them) are the same; None where they may be.

    Raises:
        Unparsed: there is something in them that cannot be read, or it takes longer than `timeout` seconds.
    """
    if _spelled(found) == _spelled(wanted):
        return True
    found, wanted = _without_names(found, wanted)
    if (target := _number_that_is(wanted)) is not None:
        told = _equal_to_number(found, target, wanted)
        if told != UNTOLD:
            return told
    elif holds_words(wanted):
        return _equal_words(found, wanted)
    if (based := _equal_in_bases(found, wanted)) != UNTOLD:
        return based
    if holds_words(found) and _number_that_is(found) is None:
        if MATHEMATICS.search(found) or holds(bare(found), bare(wanted)):
            raise Unparsed(f"{found!r} holds words beside mathematics")
        return False
    if _MANY.search(found + wanted):
        raise Unparsed(f"{found!r} or {wanted!r} holds more than expressions")
    return _equal_in_parts(found, wanted, timeout)


def holds_words(text: str) -> bool:
    """Whether there is prose in a text: words that are no functions, or letters that mathematics has not."""
    return bool(_WORD.search(re.sub(r"\\[a-zA-Z]+", " ", normal(text))))


def _spelled(text: str) -> str:
    """The text without spaces, and a letter without the brackets around it."""
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", re.sub(r"\s", "", text).replace("{,}", ","))


def _without_names(found: str, wanted: str) -> tuple[str, str]:
    """`x = 5` is 5 where the other side has no name, or the same."""
    (a, inside), (b, target) = unnamed(found), unnamed(wanted)
    if "y" in (a, b) and any("(" in name for name in (a, b)):  # y and f(x)
        return inside, target
    equation = ("=" in found and not a) or ("=" in wanted and not b)
    return (found, wanted) if (a and b and a != b) or equation else (inside, target)


def _equal_words(found: str, wanted: str) -> bool | None:
    a, b = bare(found), bare(wanted)
    if b in (a, plain_sentence(a)) or a.replace(" ", "") == b.replace(" ", ""):
        return True
    digits = [re.findall(r"\d+", text) for text in (a, b)]
    if holds(a, b) or (not holds_words(found) and digits[0] and digits[0] == digits[1]):
        return None
    return False


def _number_that_is(text: str) -> Number | None:
    """The number that a text is, whole, perhaps with a unit or a noun behind it; None where it is more, or none."""
    found = mentions(text)
    if (
        len(found) != 1
        or found[0].sure is None
        or found[0].sure.form not in ("", "%", ":")
        or _MONTH.search(text)
    ):
        return None
    said = plain(text)
    if re.match(r"\W*[A-Za-z]", said) and not said.casefold().startswith(tuple(NUMBER_STARTS)):
        return None
    behind = re.sub(r"^.*\d", "", said, flags=re.DOTALL)
    rest = re.sub(r"[)}!%°\s.]|per cent|[/^]", "", behind)
    return found[0].sure if re.fullmatch(r"[^\W\d_]*[$€£¥]?", rest) else None


NUMBER_STARTS = (
    *"zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split(),
    *"seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred half minus".split(),
    *"negative sqrt pi usd eur".split(),
)


def _equal_to_number(found: str, target: Number, wanted: str) -> Verdict:
    """Against a number; UNTOLD where the text is none, and more than prose."""
    reading = read_number(found)
    verdicts = [_same_number(one, target, found, wanted) for one in (reading.number, *reading.perhaps) if one]
    if (
        reading.number is not None
        and _number_that_is(found) is None
        and not holds_words(found)
        and unnamed(found)[0] == ""
    ):
        return UNTOLD  # "2x + 1 = 3"
    if not verdicts:
        return UNTOLD
    if reading.number is not None and verdicts[0]:
        return True
    return None if True in verdicts or None in verdicts else False


def _same_number(one: Number, target: Number, found: str, wanted: str) -> bool | None:
    exact = same(one, target)
    if exact is not False or one.parts or target.parts or one.form not in ("", "%"):
        return exact
    texts = [text for text in (found, wanted) if re.search(r"\d\.\d", text)]
    endless = [value for value in (one.value, target.value) if _endless(value)]
    if len(texts) != 1 or not endless:
        return False
    places = len(re.findall(r"\.(\d+)", texts[0])[-1])
    return within_places(one.value, target.value, places)


def _endless(value: Fraction | float) -> bool:
    below = value.denominator if isinstance(value, Fraction) else 3
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below != 1


def _equal_in_bases(found: str, wanted: str) -> Verdict:
    a, b = (_BASE.fullmatch(re.sub(r"\s", "", text)) for text in (found, wanted))
    if b is None or not b["digits"][0].isdigit():
        return UNTOLD
    if a is not None:
        return (a["digits"].lower(), int(a["base"])) == (b["digits"].lower(), int(b["base"]))
    return None if re.search(r"\d", found) and re.sub(r"\W", "", found) == b["digits"] else False


def _equal_in_parts(found: str, wanted: str, timeout: int) -> bool | None:
    a, b = parts_of(found), parts_of(wanted)
    relations = [bool(_RELATION.search(text)) for text in (found, wanted)]
    if any(relations):
        several = [p.parts if p.kind == "list" else (t,) for p, t in ((a, found), (b, wanted))]
        return equal_expressions(several[0], several[1], timeout)
    if a.kind == b.kind == "one":
        return equal_expressions((_without_unit(found),), (_without_unit(wanted),), timeout)
    if "one" in (a.kind, b.kind):
        return False
    return _equal_lists(a, b, timeout)


def _equal_lists(a: Parts, b: Parts, timeout: int) -> bool | None:
    if "ordered" in (a.kind, b.kind):
        if len(a.parts) != len(b.parts):
            return False
        verdicts = [equal(x, y, timeout) for x, y in zip(a.parts, b.parts, strict=True)]
        told = False if False in verdicts else None if None in verdicts else True
        if a.kind != b.kind:
            return None if told else told
        return told if a.brackets == b.brackets or len(a.parts) > 2 else False
    return _equal_unordered(a.parts, b.parts, timeout)


def _equal_unordered(a: Sequence[str], b: Sequence[str], timeout: int) -> bool | None:
    """Each part of one side has its own on the other."""
    left = list(a)
    doubtful = False
    if len(a) != len(b):
        return False
    for target in b:
        verdicts = [equal(one, target, timeout) for one in left]
        at = next((i for i, verdict in enumerate(verdicts) if verdict), None)
        if at is None:
            at = next((i for i, verdict in enumerate(verdicts) if verdict is None), None)
            doubtful = True
        if at is None:
            return False
        del left[at]
    return None if doubtful else True


def _without_unit(text: str) -> str:
    match = _UNIT.match(text)
    known = (
        match
        and (len(match["unit"]) > 1 or not re.search(r"[a-z]", match["value"].replace("\\", "")))
        and unit_of(match["unit"])
    )
    return match["value"] if match and known else text
