"""The options of a multiple-choice question that a text names: by letter, by words, by value; and those it denies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from interp.questions.grading.normal import plain
from interp.questions.grading.number import read_number, same
from interp.questions.grading.numerals import in_digits
from interp.questions.grading.statement import last_sentence
from interp.questions.grading.words import ARTICLE, bare, holds, plain_sentence

_WORD = (
    r"(?:the\s+)?(?:correct\s+|right\s+|final\s+)?(?:options?|choices?|letter|answer|选项|選項|选择|选|選)"
)
_ALONE = re.compile(
    rf"\W*(?:{_WORD})?\W*(?P<letter>[A-Za-z])\W*(?:选项|項|项|です|번|입니다|이다|예요|番)*\W*", re.I
)
_LEADING = re.compile(
    rf"\W*(?:{_WORD}\s*)?(?:\((?P<a>[A-Za-z])\)|\[(?P<b>[A-Za-z])\]|(?P<c>[A-Za-z])\)|(?P<d>[A-Za-z])[.:](?=\s|$|"
    rf"\S{{2}})|"
    r"(?P<e>[A-Z])(?:\s*[,;:\-]|\s+(?:because|since|as|is|due|for|given)\b|(?=[一-鿿,])))[\s.:*_,;\-]*(?P<rest>.*)",
    re.DOTALL,
)
_REASON = re.compile(r"(?i)\b(?:because|since|due to|given|as (?:it|the|there))\b|因为|因為|由于")
_LETTERS = (
    re.compile(r"[(\[](?P<letter>[A-Za-z])[)\]]"),
    re.compile(r"\b(?:option|choice|letter|answer)\s+\(?(?P<letter>[A-Za-z])\b(?!\s+[a-z]{2})", re.I),
    re.compile(r"(?:选项|選項|选择|选|選)\s*(?P<letter>[A-Za-z])(?![A-Za-z])"),
    re.compile(r"(?<![\w'.-])(?P<letter>[B-HJ-Z])(?![\w']|\.\w|-\w)"),
    re.compile(
        r"(?:^|\b(?:is|be|choose|pick|select|with|say|or|and|are|both|so|hence|"
        r"thus)\s+)(?P<letter>[A-Z])(?=\s*(?:[.,;:!]|$|\bor\b|\band\b))"
    ),
)
_NEGATED = (
    re.compile(
        r"(?:\banything but|\bnot|n't|\brather than|\binstead of|\bneither|\bnor|\bexcept|\bexclud\w+|"
        r"\brule[sd]? out|\beliminat\w+|不是|不选|并非|非)\s*(?:(?:be|choose|pick|select|say)\s+)?"
        r"(?:the\s+|an?\s+|option\s+|choice\s+)*[(\[]?(?P<what>{what})",
        re.I,
    ),
    re.compile(
        r"(?<![\w'])[(\[]?(?P<what>{what})[)\]]?\s*(?:is|are|was|would be|seems)?\s*(?:not |n't |"
        r"never )?(?:incorrect|wrong|false|not (?:correct|right|it|the)|不对|不正确|错误|不是)",
        re.I,
    ),
)
_INDEX = re.compile(r"\b(?P<n>first|second|third|fourth|fifth|last)\s+(?:option|choice|one|answer)\b", re.I)
_ORDER = ("first", "second", "third", "fourth", "fifth")


@dataclass
class Named:
    """Numbers (from 0) of the options that a text names, and of those that it denies."""

    chosen: set[int] = field(default_factory=set)
    denied: set[int] = field(default_factory=set)


def named_options(text: str, options: Sequence[str]) -> Named:
    """The options that a text names, in all of it or, where that is several, in its last line or sentence."""
    text = _without_echo(text, options)
    alone = {place for line in text.split("\n") for place in _alone(plain(line), options)}
    if len(alone) == 1 and "\n" in text:
        return Named(alone)
    named = _named(text, options)
    for scope in (text.strip().rpartition("\n")[2], last_sentence(text), _REASON.split(text)[0]):
        if len(named.chosen) <= 1:
            break
        inside = _named(scope, options)
        named = inside if len(inside.chosen) == 1 else named
    return named


def _without_echo(text: str, options: Sequence[str]) -> str:
    """A text without the list of all options, repeated, that something stands beside."""
    lines = (rf"[(\[]?{chr(ord('A') + i)}[)\].:,]*\s*{re.escape(option)}" for i, option in enumerate(options))
    without = re.sub(r"\W*".join(lines), " ", text, flags=re.I)
    return without if re.search(r"\w", without) else text


def _named(text: str, options: Sequence[str]) -> Named:
    said, texts = plain(text), [bare(option) for option in options]
    if equal := _equal(text, texts):
        return Named(equal | _alone(said, options))
    denied, left = _denials(said, options, texts)
    chosen = _affirmed(left, options, texts) if re.search(r"\w", left) else set()
    return Named(chosen, denied - chosen)


def _equal(text: str, texts: Sequence[str]) -> set[int]:
    """Options that a text is, whole."""
    whole = {_closed(bare(text)), _closed(plain_sentence(bare(text)))}
    if same_text := {i for i, option in enumerate(texts) if option and _closed(option) in whole}:
        return same_text
    without = {ARTICLE.sub("", one, count=1) for one in whole}
    return {i for i, option in enumerate(texts) if ARTICLE.sub("", option, count=1) in without - {""}}


def _closed(text: str) -> str:
    return re.sub(r"(?<=[\d(])\s+|\s+(?=[\d)])", "", text)


def _alone(said: str, options: Sequence[str]) -> set[int]:
    match = _ALONE.fullmatch(said)
    return numbers_of([match["letter"]], options) if match else set()


def _affirmed(said: str, options: Sequence[str], texts: Sequence[str]) -> set[int]:
    """The options that a text without denials names."""
    if _ALONE.fullmatch(said):
        return _alone(said, options)
    if equal := _equal(said, texts):
        return equal
    if (lead := _yes_or_no(said, texts)) is not None:
        return {lead}
    if (leading := _LEADING.fullmatch(said)) and (letter := numbers_of(_found(leading, "abcde"), options)):
        rest = bare(plain_sentence(bare(_REASON.split(leading["rest"])[0].split("\n")[0])))
        label = {i for i, option in enumerate(texts) if option and rest in (option, f"{option}.")}
        return letter | (label or _behind_a_letter(rest, texts))
    labelled = re.fullmatch(r"\W*(?P<letter>[A-Z])\s+(?P<rest>.+)", said, re.DOTALL)
    letter = numbers_of([labelled["letter"]], options) if labelled else set()
    if labelled and letter and _equal(labelled["rest"], texts) == letter:
        return letter
    return _in_prose(said, options, texts)


def _behind_a_letter(rest: str, texts: Sequence[str]) -> set[int]:
    """An option's text with which what stands behind a letter begins: "B. 135° since ..."."""
    begins = [
        i for i, option in enumerate(texts) if option and re.match(rf"{re.escape(option)}(?![\w%°./])", rest)
    ]
    longest = max((len(texts[i]) for i in begins), default=0)
    return {i for i in begins if len(texts[i]) == longest} if len(rest.split()) <= 6 else set()


def _in_prose(said: str, options: Sequence[str], texts: Sequence[str]) -> set[int]:
    by_text = _mentioned(bare(in_digits(said)), [bare(in_digits(plain(text))) for text in texts])
    by_letter = numbers_of([m["letter"] for pattern in _LETTERS for m in pattern.finditer(said)], options)
    by_letter = {i for i in by_letter if not any(holds(texts[j], chr(ord("a") + i)) for j in by_text)}
    if not by_text and (index := _INDEX.search(said)):
        place = len(options) - 1 if index["n"].lower() == "last" else _ORDER.index(index["n"].lower())
        by_letter |= {place} if place < len(options) else set()
    return by_text | by_letter or _of_value(said, options)


def _denials(said: str, options: Sequence[str], texts: Sequence[str]) -> tuple[set[int], str]:
    """Options that are denied ("not A", "B is wrong"), and the text without the denials."""
    words = [re.escape(text) for text in texts if len(text) > 1 and text not in ("yes", "no")]
    what = "|".join([*sorted(words, key=len, reverse=True), r"(?<![\w'])[A-Za-z](?![\w'])"])
    item = rf"(?:option\s+|an?\s+|the\s+)?[(\[]?(?:{what})[)\]]?"
    several = rf"(?:{what})[)\]]?(?:(?:\s*,\s*{item}){{0,26}}\s*,?\s*(?:and|or|nor|和|或|及)\s*{item})?"
    denied: set[int] = set()
    for pattern in _NEGATED:
        compiled = re.compile(rf"{pattern.pattern.replace('{what}', several)}(?![A-Za-z0-9])", re.I)
        items = [m[0] for match in compiled.finditer(said) for m in re.finditer(what, match["what"], re.I)]
        for item in dict.fromkeys(items):
            named = bare(item)
            denied |= numbers_of([item], options) | {i for i, t in enumerate(texts) if t == named}
        said = compiled.sub(" ", said)
    return denied, said


def _of_value(text: str, options: Sequence[str]) -> set[int]:
    """Options with the same value as the one number in the text: 12 and 12°, 1/2 and 0.5."""
    found = read_number(text).number
    values = [read_number(option).number for option in options]
    if found is None or any(value is None for value in values):
        return set()
    return {i for i, value in enumerate(values) if value is not None and same(found, value)}


def _yes_or_no(said: str, texts: Sequence[str]) -> int | None:
    lead = re.match(r"\W*(yes|no)\b(?=\W*(?:[,.;:!\n-]|$))", said, re.I)
    return texts.index(lead[1].lower()) if lead and lead[1].lower() in texts else None


def _found(match: re.Match[str], groups: str) -> list[str]:
    return [match[name] for name in groups if match[name]]


def numbers_of(letters: Sequence[str], options: Sequence[str]) -> set[int]:
    numbers = [ord(letter.upper()) - ord("A") for letter in letters if len(letter) == 1 and letter.isascii()]
    return {number for number in numbers if 0 <= number < len(options)}


def _mentioned(text: str, texts: Sequence[str]) -> set[int]:
    """Options that stand in the text as whole words or numbers, but not within a longer option that does."""
    left, found = text, set()
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if not texts[i]:
            continue
        word = r"一-鿿぀-ヿ가-힣"
        start = rf"(?<![^\W{word}])(?<![/:√^-])(?<!\d[.,])"
        whole = re.compile(rf"{start}{re.escape(texts[i])}(?![^\W{word}])(?![/:%°^!-]\w|[%°!^])(?![.,]\d)")
        if whole.search(left):
            found.add(i)
            left = whole.sub(" ¦ ", left)
    return found
