"""Grading by the rule that an example names in `meta["grader"]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hooks.errors import FrankenlensError, nearest, shown
from interp.questions.examples import Example
from interp.questions.grading.box import judge_box
from interp.questions.grading.choice import judge_choice
from interp.questions.grading.grade import REFERENCE, Grade, Ungraded
from interp.questions.grading.mathematics import judge_math
from interp.questions.grading.number import judge_number
from interp.questions.grading.settings import setting
from interp.questions.grading.words import judge_exact, judge_text


def _number(answer: str, example: Example) -> Grade:
    tolerance, decimals = setting(example.meta, "tolerance", 0), setting(example.meta, "decimals", None)
    return judge_number(answer, example.answer, tolerance=tolerance, decimals=decimals)


def _choice(answer: str, example: Example) -> Grade:
    choices = example.meta.get("choices") or ()
    if not isinstance(choices, (list, tuple)) or not all(isinstance(one, str) for one in choices):
        raise FrankenlensError(f"example {example.id!r}: choices is {shown(choices)}; give a list of texts")
    if len(choices) > MOST or sum(map(len, choices)) > REFERENCE:
        return Grade(
            None, why=f"{len(choices)} options of {sum(map(len, choices)):,} characters are not told apart"
        )
    return judge_choice(answer, example.answer, choices)


MOST = 26
"""Options that have a letter."""

GRADERS: Mapping[str, Callable[[str, Example], Grade]] = {
    "exact": lambda answer, example: judge_exact(answer, example.answer),
    "text": lambda answer, example: judge_text(answer, example.answer),
    "choice": _choice,
    "number": _number,
    "box": lambda answer, example: judge_box(
        answer, example.answer, float(setting(example.meta, "iou", 0.5))
    ),
    "math": lambda answer, example: judge_math(answer, example.answer),
}
"""Rules by name, and what else of `meta` they read: choice `choices`, number `tolerance` and `decimals`, box `iou`."""


def judge(answer: str | None, example: Example) -> Grade:
    """Grade an answer by the rule in `example.meta["grader"]` ("exact" where there is none).

    Args:
        answer: a reply's answer; None where it has none, which is wrong.
        example: with the reference.

    Raises:
        FrankenlensError: there is no such rule, or the example's settings of it are none.

    Example:
        >>> one = fl.Example("1", (), "What is half of 3?", "1.5", meta={"grader": "number"})
        >>> fl.grading.judge("It is 3/2.", one)
        Grade(right=True, read='3/2', why='')
        >>> fl.grading.judge("1 or 2", one)
        Grade(right=None, read='1 or 2', why='several numbers: 1, 2')
    """
    rule = _rule(example)
    return Grade(False, "", "no answer") if answer is None else rule(answer, example)


def grade(answer: str | None, example: Example) -> bool:
    """`judge` as a `Grader`: whether the answer is right.

    Raises:
        Ungraded: neither right nor wrong; says why. A caller records it and leaves the answer out of its n.
    """
    found = judge(answer, example)
    if found.right is None:
        raise Ungraded(f"example {example.id!r}: {found.why}")
    return found.right


def reference_fault(example: Example) -> str:
    """Why no answer to this example could be graded right (its own reference is not); `""` where one could."""
    found = judge(example.answer, example)
    if found.right:
        return ""
    return (
        found.why
        or f"the reference {example.answer!r} is not right by the grader {example.meta.get('grader')!r}"
    )


def require_gradable(examples: Sequence[Example]) -> None:
    """Refuse examples whose references cannot be graded, before any work starts.

    Raises:
        FrankenlensError: names the first and counts them.
    """
    faults = {example.id: fault for example in examples if (fault := reference_fault(example))}
    if faults:
        first, why = next(iter(faults.items()))
        raise FrankenlensError(
            f"{len(faults)} of {len(examples)} examples cannot be graded, the first is {first!r}: {why}. Leave them "
            f"out, or name another grader in meta['grader'] ({', '.join(GRADERS)})."
        )


def _rule(example: Example) -> Callable[[str, Example], Any]:
    name = example.meta.get("grader", "exact")
    if not isinstance(name, str) or name not in GRADERS:
        raise FrankenlensError(
            f"example {example.id!r} names the grader {shown(name)}; there are {', '.join(GRADERS)}. "
            f"{nearest(name, GRADERS)}".strip()
        )
    return GRADERS[name]
