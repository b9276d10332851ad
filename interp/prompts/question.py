"""Where the user's question is: in the rendered template, and in the tokens after images are expanded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hooks.errors import FrankenlensError
from interp.questions.examples import Example

STAND_IN = "frankenlensquestionstandin"


def question_span(render: Callable[[str], str], example: Example) -> tuple[str, tuple[int, int]]:
    """The rendered prompt, and the characters of it that are the question.

    Arguments:
        render: question -> rendered chat template.

    Raises:
        FrankenlensError: the template leaves the question out, repeats it, or changes more than the spaces around it.
    """
    text, marked = render(example.question), render(STAND_IN)
    if marked.count(STAND_IN) == 1:
        start = marked.index(STAND_IN)
        tail = marked[start + len(STAND_IN) :]
        for question in (example.question, example.question.strip()):
            if text == marked[:start] + question + tail:
                lead = len(question) - len(question.lstrip())
                return text, (start + lead, start + len(question.rstrip()))
    raise FrankenlensError(
        f"example {example.id!r}: the question {example.question[:60]!r} cannot be found in the rendered chat "
        "template; the template must hold it once and unchanged"
    )


def question_tokens(
    tokenizer: Any,
    text: str,
    span: tuple[int, int],
    ids: Sequence[int],
    arguments: dict[str, Any],
    example: Example,
) -> tuple[int, int]:
    """First and one past the last token of the question among `ids`, in which images are expanded.

    Expanding an image placeholder changes no other token, so the question's tokens in the unexpanded text recur in
    `ids` as often, and in the same order.

    Raises:
        FrankenlensError: they do not.
    """
    plain, (start, end) = _plain_tokens(tokenizer, text, span, arguments)
    run = plain[start:end]
    before, after = _occurrences(plain, run), _occurrences(ids, run)
    if not run or len(before) != len(after):
        raise FrankenlensError(
            f"example {example.id!r}: the {len(run)} tokens of the question {example.question[:60]!r} occur "
            f"{len(after)} times in the prompt's tokens where {len(before)} are expected; does the processor change "
            "text when it expands images?"
        )
    first = after[before.index(start)]
    return first, first + len(run)


def _plain_tokens(
    tokenizer: Any, text: str, span: tuple[int, int], arguments: dict[str, Any]
) -> tuple[list[int], tuple[int, int]]:
    """Tokens of the unexpanded text, and which of them hold a character of the span."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True, **arguments)
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < span[1] and b > span[0]]
        return list(encoded["input_ids"]), (inside[0], inside[-1] + 1) if inside else (0, 0)
    ids = list(tokenizer(text, **arguments)["input_ids"])
    head = list(tokenizer(text[: span[0]], **arguments)["input_ids"])
    tail = list(tokenizer(text[span[1] :], add_special_tokens=False)["input_ids"])
    start = _common(ids, head)
    return ids, (start, max(start, len(ids) - _common(ids[::-1], tail[::-1])))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _occurrences(ids: Sequence[int], run: Sequence[int]) -> list[int]:
    ids, run = list(ids), list(run)
    return [i for i in range(len(ids) - len(run) + 1) if ids[i : i + len(run)] == run] if run else []
