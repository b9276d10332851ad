"""Which delimiters do traces show? Formats are proposed by what stands in the text, and tried before they are named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from interp.prompts.roles import TraceFormat

Pair = tuple[str, str]
Found = TypeVar("Found")

_PAIRED = (
    (re.compile(r"<([A-Za-z_][\w-]*)>"), "</{}>"),
    (re.compile(r"\[([A-Za-z_][\w-]*)\]"), "[/{}]"),
    (re.compile(r"◁(\w+)▷"), "◁/{}▷"),
    (re.compile(r"<\|begin_of_(\w+)\|>"), "<|end_of_{}|>"),
    (re.compile(r"<\|(\w+)_start\|>"), "<|{}_end|>"),
)
"""Openings, and the closing that belongs to one."""
_LABEL = re.compile(r"^[\s#*]*((?:[^\W\d_]+ ){0,3}[^\W\d_]+ ?:)", re.MULTILINE)
"""A line that begins with a few words and a colon: "Final Answer:"."""
_SHARE = 0.5  # of the traces, that show a delimiter which is tried
_TAIL = 40  # characters of a prompt, in which a chat template may open the reasoning itself
_TRIED = 12  # delimiters, the commonest


@dataclass(frozen=True)
class Proposal:
    """A format that reads traces.

    Attributes:
        trace_format: it.
        n: how many of the traces it reads.
    """

    trace_format: TraceFormat
    n: int


def proposed(own: TraceFormat, written: Sequence[tuple[str, str]]) -> Proposal | None:
    """The format that traces themselves show: the most telling of those that read nearly as many as any.

    Arguments:
        own: the format by which they were read, whose ends of turn hold for others too.
        written: text of the prompt, and what a model wrote behind it.

    Returns:
        None where no format with a delimiter reads half of them.

    Example:
        >>> from interp.prompts.proposals import proposed
        >>> show = [("", f"[plan] {n} red [/plan] Result: {n}") for n in range(4)]
        >>> proposed(fl.TraceFormat(), show).trace_format.reasoning
        ('[plan]', '[/plan]')
    """
    if not written:
        return None
    tails = [prompt.rstrip()[-_TAIL:] for prompt, _ in written]
    texts = [trace for _, trace in written]
    tried = []
    for one in _formats(own, [tail + text for tail, text in zip(tails, texts, strict=True)]):
        opened = [one.reasoning is not None and tail.endswith(one.reasoning[0]) for tail in tails]
        read = [one.parse(text, begun).ok for text, begun in zip(texts, opened, strict=True)]
        tried.append(Proposal(one, sum(read)))
    most = max((one.n for one in tried), default=0)
    if most < _SHARE * len(texts):
        return None
    return max(
        (one for one in tried if one.n >= 0.9 * most), key=lambda one: (*_telling(one.trace_format), one.n)
    )


def _telling(one: TraceFormat) -> tuple[bool, int, int]:
    """What a format delimits: reasoning or not; the answer on both sides, before it, or not; in how many letters."""
    if one.answer is None:
        return one.reasoning is not None, 0, 0
    return one.reasoning is not None, 1 if one.answer[1] is None else 2, len(one.answer[0])


def _formats(own: TraceFormat, texts: Sequence[str]) -> Iterator[TraceFormat]:
    """Every reasoning with every answer that the texts show behind it, but for no delimiter at all."""
    pairs = _frequent(texts, _pairs)
    for reasoning in (*pairs, None):
        after = texts if reasoning is None else [text.partition(reasoning[1])[2] for text in texts]
        answers = [*_frequent(after, _pairs), *_frequent(after, _boxes), *_frequent(after, _labels)]
        if reasoning is not None:
            answers += [*_frequent(after, _first_words), None]
        for answer in answers:
            yield replace(own, reasoning=reasoning, answer=answer)


def _boxes(text: str) -> Iterable[Pair]:
    return [("\\boxed{", "}")] if "\\boxed{" in text else []


def _labels(text: str) -> Iterable[tuple[str, None]]:
    return [(label, None) for label in _LABEL.findall(text)[-1:]]


def _pairs(text: str) -> Iterable[Pair]:
    for opening, closing in _PAIRED:
        for found in opening.finditer(text):
            close = closing.format(found[1])
            if close in text[found.end() :]:
                yield found[0], close


def _first_words(text: str) -> Iterable[tuple[str, None]]:
    """The one, two, three words that stand there first, if another follows."""
    words = re.match(r"\s*((?:[^\W\d_]+\s+){1,3})\S", text)
    if words is not None:
        said = words[1].split()
        for n in range(1, len(said) + 1):
            yield " ".join(said[:n]), None


def _frequent(texts: Sequence[str], found_in: Callable[[str], Iterable[Found]]) -> list[Found]:
    """What enough of the texts show, the commonest first."""
    counts = Counter(one for text in texts for one in set(found_in(text)))
    return [one for one, n in counts.most_common(_TRIED) if n >= _SHARE * len(texts)]
