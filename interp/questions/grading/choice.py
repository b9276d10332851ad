"""Multiple choice: an option's letter or its text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from interp.questions.grading.grade import Grade
from interp.questions.grading.normal import plain
from interp.questions.grading.number import read_number, same, unread_script
from interp.questions.grading.statement import last_sentence, statement_of
from interp.questions.grading.words import bare, holds, plain_sentence

_WORD = (
    r"(?:the\s+)?(?:correct\s+|right\s+|final\s+)?(?:options?|choices?|letter|answer|选项|選項|选择|选|選)"
)
_ALONE = re.compile(rf"\W*(?:{_WORD})?\W*(?P<letter>[A-Za-z])\W*(?:选项|項|项|です|입니다)?\W*", re.I)
_LEADING = re.compile(
    rf"\W*(?:{_WORD}\s*)?(?:\((?P<a>[A-Za-z])\)|\[(?P<b>[A-Za-z])\]|(?P<c>[A-Za-z])\)|(?P<d>[A-Za-z])[.:](?=\s|$|\S{{2}})|"
    r"(?P<e>[A-Z])(?:\s*[,;:\-]|\s+(?:because|since|as|is|due|for|given)\b|(?=[一-鿿,])))[\s.:*_,;\-]*(?P<rest>.*)",
    re.DOTALL,
)
_REASON = re.compile(r"(?i)\b(?:because|since|due to|given|as (?:it|the|there))\b|因为|因為|由于")
_LETTERS = (
    re.compile(r"[(\[](?P<letter>[A-Za-z])[)\]]"),
    re.compile(r"\b(?:option|choice|letter|answer)\s+\(?(?P<letter>[A-Za-z])\b(?!\s+[a-z]{2})", re.I),
    re.compile(r"(?:选项|選項|选择|选|選)\s*(?P<letter>[A-Za-z])(?![A-Za-z])"),
    re.compile(r"(?<![\w'.-])(?P<letter>[B-HJ-Z])(?![\w'.]|\.\w|-\w)"),
    re.compile(
        r"\b(?:is|be|choose|pick|select|with|say|or|and|are|both)\s+(?P<letter>[A-Z])(?=\s*(?:[.,;:!]|$|\bor\b|\band\b))"
    ),
)
_NEGATED = (
    re.compile(
        r"(?:\bnot|n't|\brather than|\binstead of|\bneither|\bnor|\bexcept|\bexclud\w+|\brule[sd]? out|\beliminat\w+|不是|不选|并非|非)\s*(?:be\s+)?"
        r"(?:the\s+|an?\s+|option\s+|choice\s+)*[(\[]?(?P<what>{what})",
        re.I,
    ),
    re.compile(
        r"[(\[]?(?P<what>{what})[)\]]?\s*(?:is|are|was|would be|seems)?\s*(?:not |n't |never )?(?:incorrect|wrong|false|not (?:correct|right|it|the)|不对|不正确|错误|不是)",
        re.I,
    ),
)
_INDEX = re.compile(r"\b(?P<n>first|second|third|fourth|fifth|last)\s+(?:option|choice|one|answer)\b", re.I)
_ORDER = ("first", "second", "third", "fourth", "fifth")
_LABEL = re.compile(r"\s*(?:\((?P<a>[A-Za-z])\)|(?P<b>[A-Za-z])\s*[.):,])\s*(?=\S)")


@dataclass
class Named:
    """Numbers (from 0) of the options that a text names, and of those that it denies."""

    chosen: set[int] = field(default_factory=set)
    denied: set[int] = field(default_factory=set)


def judge_choice(answer: str, reference: str, options: Sequence[str]) -> Grade:
    """Whether the answer names the option that is right, by letter (A is the first), by text or by value.

    An answer whose letter and text disagree, or that names several options, is left ungraded.

    Example:
        >>> fl.grading.judge_choice("(B)", "blue", ["red", "blue"]).right
        True
        >>> fl.grading.judge_choice(r"The answer is not A. It is $12^\\circ$.", "B", ["10°", "12°"]).right
        True
        >>> fl.grading.judge_choice("red or blue", "blue", ["red", "blue"])
        Grade(right=None, read='red or blue', why='the answer names 2 options: red, blue')
    """
    texts = _without_labels(options)
    wanted = _of_reference(reference, texts)
    if isinstance(wanted, str):
        return Grade(None, why=wanted)
    statement = statement_of(answer)
    read = statement.text
    named = named_options(read, texts)
    if len(named.chosen) > 1:
        names = ", ".join(options[i] for i in sorted(named.chosen))
        return Grade(None, read, f"the answer names {len(named.chosen)} options: {names}")
    if named.chosen:
        return Grade(named.chosen == {wanted}, read)
    if wanted in named.denied:
        return Grade(False, read, "the answer denies the option")
    if why := _unread(read, texts, statement.retracted, bool(named.denied)):
        return Grade(None, read, why)
    return Grade(False, read, "the answer names none of the options")


def named_options(text: str, options: Sequence[str]) -> Named:
    """The options that a text names, in all of it or, where that is several, in its last line or sentence."""
    text = _without_echo(text, options)
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
    equal = {
        i
        for i, option in enumerate(texts)
        if option and option in (bare(text), bare(plain_sentence(bare(text))))
    }
    if alone := _ALONE.fullmatch(said):
        return Named(equal | _numbers([alone["letter"]], options))
    if equal:
        return Named(equal)
    if (lead := _yes_or_no(said, texts)) is not None:
        return Named({lead})
    if (leading := _LEADING.fullmatch(said)) and (letter := _numbers(_found(leading, "abcde"), options)):
        rest = bare(plain_sentence(bare(_REASON.split(leading["rest"])[0].split("\n")[0])))
        label = {i for i, option in enumerate(texts) if option and rest in (option, f"{option}.")}
        others = set() if label else _behind_a_letter(rest, texts)
        return Named(letter | label | others)
    labelled = re.fullmatch(r"\W*(?P<letter>[A-Z])\s+(?P<rest>.+)", said, re.DOTALL)
    if labelled and (letter := _numbers([labelled["letter"]], options)):
        if {i for i, option in enumerate(texts) if option == bare(labelled["rest"])} == letter:
            return Named(letter)
    return _in_prose(said, options, texts)


def _behind_a_letter(rest: str, texts: Sequence[str]) -> set[int]:
    """An option's text with which what stands behind a letter begins: "B. 135° since ..."."""
    begins = [
        i for i, option in enumerate(texts) if option and re.match(rf"{re.escape(option)}(?![\w%°./])", rest)
    ]
    longest = max((len(texts[i]) for i in begins), default=0)
    return {i for i in begins if len(texts[i]) == longest} if len(rest.split()) <= 6 else set()


def _in_prose(said: str, options: Sequence[str], texts: Sequence[str]) -> Named:
    denied, left = _denials(said, options, texts)
    by_text, without = _mentioned(bare(left), texts)
    by_letter = _numbers([m["letter"] for pattern in _LETTERS for m in pattern.finditer(left)], options)
    by_letter = {i for i in by_letter if not any(holds(texts[j], chr(ord("a") + i)) for j in by_text)}
    if not by_text and (index := _INDEX.search(left)) and len(options) > 1:
        place = len(options) - 1 if index["n"].lower() == "last" else _ORDER.index(index["n"].lower())
        by_letter |= {place} if place < len(options) else set()
    if not by_text and not by_letter:
        by_text = _of_value(left, options)
    return Named(by_text | by_letter, denied - by_text - by_letter)


def _denials(said: str, options: Sequence[str], texts: Sequence[str]) -> tuple[set[int], str]:
    """Options that are denied ("not A", "B is wrong"), and the text without the denials."""
    words = [re.escape(text) for text in texts if len(text) > 1 and text not in ("yes", "no")]
    what = "|".join([*sorted(words, key=len, reverse=True), r"[A-Za-z](?![\w'])"])
    denied: set[int] = set()
    for pattern in _NEGATED:
        compiled = re.compile(rf"{pattern.pattern.replace('{what}', what)}(?![A-Za-z0-9])", re.I)
        for match in compiled.finditer(said):
            denied |= _numbers([match["what"]], options) | {
                i for i, t in enumerate(texts) if t == bare(match["what"])
            }
        said = compiled.sub(" ", said) if denied else said
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


def _unread(read: str, texts: Sequence[str], retracted: bool, denied: bool) -> str:
    """Why an answer that names no option cannot be called wrong; "" where it can."""
    if retracted and not read.strip():
        return "an answer was taken back and none given"
    if denied:
        return "the answer says only which option it is not"
    if (script := unread_script(read)) and script != unread_script(" ".join(texts)):
        return f"the answer is in {script} letters, and the options are not"
    if set(texts) <= {"yes", "no", "maybe", "unknown"} and len(read.split()) > 2:
        return "a sentence without yes or no"
    return ""


def _without_labels(options: Sequence[str]) -> list[str]:
    """Options without the letters that they may be written with: "B. 12"."""
    labels = [_LABEL.match(option) for option in options]
    letters = [match and (match["a"] or match["b"]).upper() for match in labels]
    if letters != [chr(ord("A") + i) for i in range(len(options))]:
        return list(options)
    return [option[match.end() :] for option, match in zip(options, labels, strict=True) if match]


def _of_reference(reference: str, options: Sequence[str]) -> int | str:
    """The right option's number, or what is wrong with the reference."""
    if len(options) < 2:
        return f"a choice needs at least 2 options, the example has {len(options)}"
    label = _LABEL.match(reference)
    texts = {bare(reference)} | ({bare(reference[label.end() :])} if label else set())
    same_text = [i for i, option in enumerate(options) if bare(option) in texts]
    if len(same_text) > 1:
        return f"the reference {reference!r} is {len(same_text)} of the options"
    letter = _numbers([plain(reference).strip("()[] .")], options)
    if same_text and letter and {*same_text} != letter:
        return f"the reference {reference!r} is the text of one option and the letter of another"
    found = {*same_text} or letter
    return (
        found.pop() if found else f"the reference {reference!r} is none of the options {', '.join(options)}"
    )


def _found(match: re.Match[str], groups: str) -> list[str]:
    return [match[name] for name in groups if match[name]]


def _numbers(letters: Sequence[str], options: Sequence[str]) -> set[int]:
    numbers = [ord(letter.upper()) - ord("A") for letter in letters if len(letter) == 1 and letter.isascii()]
    return {number for number in numbers if 0 <= number < len(options)}


def _mentioned(text: str, texts: Sequence[str]) -> tuple[set[int], str]:
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
    return found, left
