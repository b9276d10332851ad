"""Grading by the rule that an example names in `meta["grader"]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hooks.errors import FrankenlensError, nearest
from interp.questions.examples import Example
from interp.questions.grading.box import judge_box
from interp.questions.grading.choice import judge_choice
from interp.questions.grading.grade import Grade, Ungraded
from interp.questions.grading.mathematics import judge_math
from interp.questions.grading.number import judge_number
from interp.questions.grading.words import judge_exact, judge_text


def _number(answer: str, example: Example) -> Grade:
    tolerance, decimals = (example.meta.get(name) for name in ("tolerance", "decimals"))
    return judge_number(answer, example.answer, tolerance=tolerance or 0, decimals=decimals)


GRADERS: Mapping[str, Callable[[str, Example], Grade]] = {
    "exact": lambda answer, example: judge_exact(answer, example.answer),
    "text": lambda answer, example: judge_text(answer, example.answer),
    "choice": lambda answer, example: judge_choice(answer, example.answer, example.meta.get("choices") or ()),
    "number": _number,
    "box": lambda answer, example: judge_box(answer, example.answer, float(example.meta.get("iou", 0.5))),
    "math": lambda answer, example: judge_math(answer, example.answer),
}
"""Rules by name, and what else of `meta` they read: choice `choices`, number `tolerance` and `decimals`, box `iou`."""


def judge(answer: str | None, example: Example) -> Grade:
    """Grade an answer by the rule in `example.meta["grader"]` ("exact" where there is none).

    Args:
        answer: a reply's answer; None where it has none, which is wrong.
        example: with the reference.

    Raises:
        FrankenlensError: there is no such rule.

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
    if name not in GRADERS:
        raise FrankenlensError(
            f"example {example.id!r} names the grader {name!r}; there are {', '.join(GRADERS)}. "
            f"{nearest(str(name), GRADERS)}".strip()
        )
    return GRADERS[name]
