"""Multiple choice: an option's letter, its text or its value."""

from __future__ import annotations

import re
from collections.abc import Sequence

from interp.questions.grading.grade import Grade, always_told
from interp.questions.grading.normal import plain
from interp.questions.grading.number import unread_script
from interp.questions.grading.options import named_options, numbers_of
from interp.questions.grading.statement import statement_of
from interp.questions.grading.words import bare

_LABEL = re.compile(r"\s*(?:\((?P<a>[A-Za-z])\)|(?P<b>[A-Za-z])\s*[.):,])\s*(?=\S)")


@always_told
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
    letter = numbers_of([plain(reference).strip("()[] .")], options)
    if same_text and letter and {*same_text} != letter:
        return f"the reference {reference!r} is the text of one option and the letter of another"
    found = {*same_text} or letter
    return (
        found.pop() if found else f"the reference {reference!r} is none of the options {', '.join(options)}"
    )
