"""The numbers that a text gives, each read whole: sign, scale, percent, unit, bound; or why it cannot be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from interp.questions.grading.arithmetic import NotArithmetic, Value, value_of
from interp.questions.grading.bounds import NEARLY, NOT, Form, bound_of
from interp.questions.grading.grade import Unread
from interp.questions.grading.literals import LITERAL, LONGEST, readings
from interp.questions.grading.normal import plain
from interp.questions.grading.numerals import in_digits
from interp.questions.grading.units import MONEY, Unit, unit_of

MOST = 100
"""Numbers in one answer that are read."""
_DIGITS = re.compile(r"\d+")
NEAR = 80
"""Characters on either side of a number that say what it is."""


@dataclass(frozen=True)
class Number:
    """A number as it was written.

    Attributes:
        value: exact; a float stands for an irrational value. "50%" is 1/2, "1:3" is 1/3.
        form: "%", ":" of a ratio, or the sign of a bound ("more than 3" is ">").
        unit: where one is known; "3 apples" has none.
        text: as it was written.
        parts: of a ratio or a time.
    """

    value: Value
    text: str
    form: Form = ""
    unit: Unit | None = None
    parts: tuple[Fraction, ...] = ()


@dataclass(frozen=True)
class Mention:
    """One place of a text that holds a number.

    Attributes:
        sure: what it is by the usual reading; None where there is none.
        perhaps: what it may be as well.
        why: where nothing can be read.
        negated: the text says that it is *not* this.
        before: what stands right before it.
        start: where it begins in the text.
    """

    text: str
    sure: Number | None = None
    perhaps: tuple[Number, ...] = ()
    why: str = ""
    negated: bool = False
    before: str = ""
    start: int = 0


_ATOM = (
    rf"(?:(?:(?:sqrt|cbrt)?\(|(?<![\d)])[-+]\s?){{0,12}}(?:{LITERAL}|pi\b)"
    r"(?:\)|!(?!=)|\s?\^\s?[-+]?\(?[-+]?\d+(?:\s*/\s*\d+)?\)?)*)"
)
_CHUNK = re.compile(
    rf"(?<![A-Za-z0-9_.^\\])(?P<sign>(?<!±)[-+]\s?)?(?P<money>(?:US|A|C|HK)?[{MONEY}]\s?)?"
    rf"(?P<chunk>{_ATOM}(?:\s*[*/+]\s*{_ATOM}|\s-\s+{_ATOM}|-{_ATOM}|(?=\s?(?:sqrt|cbrt|pi\b))\s?{_ATOM}|"
    rf"(?=\(){_ATOM}|\s\d+/\d+(?![\d/]))*)"
)
_RATIO = re.compile(
    r"(?<![\w.:/])(?P<parts>\d+(?:\.\d+)?(?:(?::\d+(?:\.\d+)?)+|"
    r"(?: : \d+(?:\.\d+)?)+))(?![\w:])(?P<half>\s*[ap]\.?m\b)?"
)
_DATE = re.compile(r"(?<![\w.])\d{1,4}([-/.])\d{1,2}\1\d{1,4}(?![\w])|(?<![\w.])\d+(?:-\d+){2,}(?!\w)")
_RANGE = re.compile(r"(?P<a>\d+(?:\.\d+)?)-(?P<b>\d+(?:\.\d+)?)")
_REPEATING = re.compile(r"(\d+)\.(\d*)overline\{(\d+)\}")
_FUNCTION = re.compile(
    r"\b(?:log|ln|lg|exp|sin|cos|tan|cot|sec|csc|lim|sum|int|binom|mod|gcd|lcm|max|min)h?(?:[_^]\S*)?\s*\(?$"
)
_LETTER_BEFORE = re.compile(r"(?<![A-Za-z'])(?!a\s)[A-Za-z]\s*(?:[*/^(]|[-+])\s*$|(?<=[A-Za-z)])\^?[*/^]\s*$")
_LETTER_BEHIND = re.compile(r"\s*[-+*/^]\s*\(*\s*[A-Za-z](?![A-Za-z])|\s*[*/^]\s*\(*[A-Za-z]")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.I)
_PERCENT = re.compile(r"\s*(?:%|‰|percent\b|per cent\b|pct\b)(?:age points?\b)?", re.I)
_SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "m": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9, "T": 10**12}
_ATTACHED = re.compile(r"[A-Za-zμµΩ]+(?:\^?\d)?(?:/[A-Za-z]+(?:\^?\d)?)?|°[CF]?|¢|[€£¥₩]")
_SPACED = re.compile(
    r"\s?-?(?P<unit>(?:(?:square|cubic|sq|cu)\.? )?[^\W\d_一-鿿가-힣]+(?:\^?-?\d)?(?:(?:\s?/\s?|"
    r" per )[^\W\d_]+(?:\^?\d)?)?|°\s?[CF]?|[€£¥₩¢])"
)
_HAN_UNIT = re.compile(r"\s?(?P<unit>[一-鿿가-힣]{1,4})")
_VARIABLE = re.compile(r"\s(?![aAI]\b)[A-Za-z]\s*(?:$|[-+*/^=])")


def mentions(text: str) -> list[Mention]:
    """The numbers of a text, in its order.

    Raises:
        Unread: there are more than `MOST`, or one of more digits than are read.
    """
    runs = _DIGITS.findall(text)
    if len(runs) > MOST or max(map(len, runs), default=0) > LONGEST:
        what = f"{len(runs)} numbers" if len(runs) > MOST else f"a number of {max(map(len, runs))} digits"
        raise Unread(f"{what} in one answer, which are not read")
    text = _REPEATING.sub(_repeating, in_digits(plain(text)))
    text = re.sub(r"(?<=\d)\s?x\s?(?=\d)", "*", text)
    text = re.sub(r"(?<![A-Za-z])pi(?=sqrt|\d)", "pi*", text)
    found = [
        replace(
            _read(match, text[max(match.start() - NEAR, 0) : match.start()], text[match.end() :][:NEAR]),
            start=match.start(),
        )
        for match in _matches(text)
    ]
    return list(_ranges(found, text))


def _matches(text: str) -> Iterator[re.Match[str]]:
    """The first of a date, a ratio and a number, again and again, from left to right."""
    kinds = {pattern: pattern.search(text) for pattern in (_DATE, _RATIO, _CHUNK)}
    at = 0
    while True:
        for pattern, match in kinds.items():
            if match is not None and match.start() < at:
                kinds[pattern] = pattern.search(text, at)
        ahead = [match for match in kinds.values() if match is not None]
        if not ahead:
            return
        first = min(ahead, key=lambda match: match.start())
        at = max(first.end(), at + 1)
        yield first


def _read(match: re.Match[str], before: str, behind: str) -> Mention:
    if match.re is _DATE:
        return Mention(match[0], why=f"{match[0]!r} is a date or a code, no number", before=before)
    return _ratio(match, before) if match.re is _RATIO else _chunk(match, before, behind)


def _ratio(match: re.Match[str], before: str) -> Mention:
    parts = tuple(Fraction(part) for part in match["parts"].replace(" ", "").split(":"))
    value = parts[0] / parts[1] if parts[1] else Fraction(0)
    return Mention(
        match[0],
        Number(value, match[0].strip(), ":", parts=parts),
        negated=bool(NOT.search(before)),
        before=before,
    )


def _chunk(match: re.Match[str], before: str, behind: str) -> Mention:
    chunk = match["chunk"]
    while chunk.count(")") > chunk.count("(") and chunk.endswith(")"):
        chunk, behind = chunk[:-1], chunk[-1] + behind
    while chunk.count("(") > chunk.count(")") and chunk.startswith("("):
        chunk, before = chunk[1:], before + "("
    sign, shown = match["sign"] or "", match[0]
    negated = bool(NOT.search(before))
    if why := _no_number(before, shown, behind):
        return Mention(shown.strip(), why=why, negated=negated, before=before)
    sure, perhaps = _values(chunk, before, behind)
    if not sure and not perhaps:
        return Mention(shown.strip(), why=f"{shown.strip()!r} is no number that can be read", before=before)
    sure, perhaps = _signed(sign, before, sure, perhaps)
    return _suffixed(match, before, behind, sure, perhaps, negated)


def _no_number(before: str, shown: str, behind: str) -> str:
    """Why what stands around digits makes them part of something else."""
    if _FUNCTION.search(before) or _LETTER_BEFORE.search(before + (shown[0] if shown[0] in "+-" else "")):
        return f"{(before.split() or [''])[-1]}{shown} is an expression, not a number (the grader 'math' reads it)"
    if _spaced_unit(behind)[0] is None and (_LETTER_BEHIND.match(behind) or _VARIABLE.match(behind)):
        return f"{shown + behind[:8]!r} is an expression, not a number (the grader 'math' reads it)"
    if behind.startswith(("_", "overline", "...")) or before.rstrip().endswith("±"):
        return f"{shown + behind[:8]!r} is no single number that can be read"
    return f"{before[-12:] + shown!r} is no exact number" if NEARLY.search(before) else ""


def _values(chunk: str, before: str, behind: str) -> tuple[list[Value], list[Value]]:
    """What arithmetic comes to: by the usual reading of its literals, and by others."""
    if tight := _RANGE.fullmatch(chunk):
        return [], [Fraction(tight["a"]) - Fraction(tight["b"])]
    literals = list(re.finditer(LITERAL, chunk))
    if len(literals) == 1 and literals[0][0] == chunk:
        sure, perhaps = readings(chunk)
        return list(sure), list(perhaps)
    pieces, at = [], 0
    for literal in literals:
        sure, _ = readings(literal[0])
        if not sure:
            return [], []
        pieces += [chunk[at : literal.start()], f"({sure[0]})" if sure[0].denominator != 1 else str(sure[0])]
        at = literal.end()
    said = "".join(pieces) + chunk[at:]
    try:
        if chunk.endswith("!") and chunk.count("!") == 1 and re.search(r"[A-Za-z]{2}", before):
            return [], [value_of(said), value_of(said[:-1])]  # the answer is 5!
        return [value_of(said)], []
    except NotArithmetic:
        return [], []


def _signed(
    sign: str, before: str, sure: list[Value], perhaps: list[Value]
) -> tuple[list[Value], list[Value]]:
    if not sign.startswith("-") or re.search(r"[^\W\d_一-鿿가-힣]$", before):  # COVID-19
        return sure, perhaps
    minus = [-value for value in sure], [-value for value in perhaps]
    if sign == "-" or re.search(r"[=(:,$]\s*$", before):
        return minus
    return [], [*minus[0], *minus[1], *sure, *perhaps]  # "Count - 5", "- 5"


def _suffixed(
    match: re.Match[str], before: str, behind: str, sure: list[Value], perhaps: list[Value], negated: bool
) -> Mention:
    """Percent, scale and unit behind the digits; a bound on either side."""
    shown, unit, form, scale, tail = match[0].strip(), None, "", 1, behind
    if match["money"]:
        unit = unit_of(match["money"].strip()[-1])
    if percent := _PERCENT.match(behind):
        form, tail, shown = "%", behind[percent.end() :], shown + percent[0]
    elif ordinal := _ORDINAL.match(behind):
        tail = behind[ordinal.end() :]
    elif attached := _ATTACHED.match(behind):
        tail = behind[attached.end() :]
        shown += attached[0]
        if attached[0] in _SCALES and (unit or attached[0] != "m"):
            scale = _SCALES[attached[0]]
        elif (unit := unit_of(attached[0]) or unit) is None:
            why = f"{shown!r} is an expression, not a number (the grader 'math' reads it)"
            return Mention(shown, why=why, negated=negated, before=before)
    else:
        read, length = _spaced_unit(behind)
        unit, tail = unit or read, behind[length:]
        shown += behind[:length]
    form = bound_of(before, tail) or form
    per = (1000 if "‰" in shown else 100) if form == "%" else 1
    made = [Number(value * scale / per, shown, form, unit) for value in sure]
    others = tuple(Number(value * scale / per, shown, form, unit) for value in perhaps)
    if scale != 1 and attached and unit_of(attached[0]):  # 5K: five thousand, or kelvin
        others = (*others, *(Number(n.value / scale, shown, form, unit_of(attached[0])) for n in made))
    return Mention(shown, made[0] if made else None, others, negated=negated, before=before)


def _spaced_unit(behind: str) -> tuple[Unit | None, int]:
    if han := _HAN_UNIT.match(behind):
        for n in range(len(han["unit"]), 0, -1):
            if unit := unit_of(han["unit"][:n]):
                return unit, han.start("unit") + n
        return None, 0
    found = _SPACED.match(behind)
    while found:
        if unit := unit_of(found["unit"].replace("° ", "°")):
            return unit, found.end()
        shorter = re.match(r"\s?-?(?P<unit>[^\W\d_]+\.?)(?=\b)", behind)
        found = shorter if shorter and shorter["unit"] != found["unit"] else None
    return None, 0


def _ranges(found: list[Mention], text: str) -> Iterator[Mention]:
    """ "3 to 5" and "between 3 and 5" are one mention each, and no number."""
    skip = False
    for place, one in enumerate(found):
        following = found[place + 1] if place + 1 < len(found) else None
        if skip:
            skip = False
            continue
        between = ""
        if following is not None:
            between = text[one.start + len(one.text) : following.start]
        is_range = following is not None and (
            re.fullmatch(r"\s*(?:\w{1,12}\s)?(?:to|~|through|until|至|到)\s*", between)
            or (re.fullmatch(r"\s*(?:and|&)\s*", between) and re.search(r"\bbetween\s*$", one.before, re.I))
        )
        if is_range and following is not None:
            skip = True
            yield Mention(
                f"{one.text}{between}{following.text}",
                None,
                _odds(one, following),
                "a range, not one number",
                before=one.before,
            )
        else:
            yield one


def _odds(one: Mention, other: Mention) -> tuple[Number, ...]:
    """ "3 to 5" may be a ratio."""
    if (
        one.sure is None
        or other.sure is None
        or not isinstance(one.sure.value, Fraction)
        or not other.sure.value
    ):
        return ()
    parts = (one.sure.value, Fraction(other.sure.value))
    return (Number(parts[0] / parts[1], f"{one.text} to {other.text}", ":", parts=parts),)


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, period = match.groups()
    below = 10 ** len(fixed)
    value = Fraction(int(whole + fixed), below) + Fraction(int(period), below * (10 ** len(period) - 1))
    return f"({value.numerator}/{value.denominator})"
