"""Multiple choice: an option's letter or its text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from interp.questions.grading.extract import extract
from interp.questions.grading.grade import Grade
from interp.questions.grading.words import plain

_ALONE = re.compile(r"\W*(?:option|choice)?\W*([A-Za-z])\W*", re.IGNORECASE)
_LEADING = re.compile(
    r"\W*(?:option\s+|choice\s+)?(?:\(([A-Za-z])\)|([A-Za-z])[.):])[\s:.*_-]*(?P<rest>.+)", re.DOTALL
)
_BRACKETED = re.compile(r"\(([A-Z])\)|\b(?:option|choice)\s+\(?([A-Z])\b", re.IGNORECASE)


def judge_choice(answer: str, reference: str, options: Sequence[str]) -> Grade:
    """Whether the answer names the option that is right, by letter (A is the first) or by text.

    An answer whose letter and text disagree, or that names several options, is left ungraded.

    Example:
        >>> fl.grading.judge_choice("(B)", "blue", ["red", "blue"]).right
        True
        >>> fl.grading.judge_choice("red or blue", "blue", ["red", "blue"])
        Grade(right=None, read='red or blue', why='the answer names 2 options: red, blue')
    """
    wanted = _of_reference(reference, options)
    if isinstance(wanted, str):
        return Grade(None, why=wanted)
    read, _ = extract(answer)
    named = named_options(read, options)
    if not named:
        return Grade(False, read, "the answer names none of the options")
    if len(named) > 1:
        return Grade(
            None,
            read,
            f"the answer names {len(named)} options: {', '.join(options[i] for i in sorted(named))}",
        )
    return Grade(named == {wanted}, read)


def named_options(text: str, options: Sequence[str]) -> set[int]:
    """Numbers (from 0) of the options that a text names."""
    texts = [plain(option) for option in options]
    named = {i for i, option in enumerate(texts) if option == plain(text)}
    if alone := _ALONE.fullmatch(text):
        return named | _letters([alone[1]], options)
    if named:
        return named
    if leading := _LEADING.fullmatch(text):
        letter = _letters([leading[1] or leading[2]], options)
        if letter:
            return letter | _mentioned(leading["rest"], texts)
    return _mentioned(text, texts) or _letters([a or b for a, b in _BRACKETED.findall(text)], options)


def _of_reference(reference: str, options: Sequence[str]) -> int | str:
    """The right option's number, or what is wrong with the reference."""
    if len(options) < 2:
        return f"a choice needs at least 2 options, the example has {len(options)}"
    same = [i for i, option in enumerate(options) if plain(option) == plain(reference)]
    if len(same) > 1:
        return f"the reference {reference!r} is {len(same)} of the options"
    letter = _letters([reference.strip("() .")], options)
    if same and letter and {*same} != letter:
        return f"the reference {reference!r} is the text of one option and the letter of another"
    found = {*same} or letter
    return (
        found.pop() if found else f"the reference {reference!r} is none of the options {', '.join(options)}"
    )


def _letters(letters: Sequence[str], options: Sequence[str]) -> set[int]:
    numbers = [ord(letter.upper()) - ord("A") for letter in letters if len(letter) == 1 and letter.isascii()]
    return {number for number in numbers if 0 <= number < len(options)}


def _mentioned(text: str, texts: Sequence[str]) -> set[int]:
    """Options that stand in the text as whole words or numbers, but not within a longer option that does."""
    left, found = plain(text), set()
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if not texts[i]:
            continue
        whole = re.compile(rf"(?<![\w/:−-])(?<!\d[.,]){re.escape(texts[i])}(?![\w/:%°−-])(?![.,]\d)")
        if whole.search(left):
            found.add(i)
            left = whole.sub(" ¦ ", left)
    return found
