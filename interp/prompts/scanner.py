"""Reads the text of a trace: where reasoning and answer lie, what it says, and the role of each piece of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

Role = Literal["image", "question", "reasoning", "answer", "template"]
State = Literal["outside", "reasoning", "answer", "ended"]


@runtime_checkable
class Delimited(Protocol):
    """What the scanner asks of a format; `interp.prompts.roles.TraceFormat` is one and says what each means."""

    @property
    def reasoning(self) -> tuple[str, str] | None: ...

    @property
    def answer(self) -> tuple[str, str | None] | None: ...

    @property
    def end_of_turn(self) -> tuple[str, ...]: ...

    @property
    def delimiters(self) -> tuple[str, ...]: ...

    @property
    def balanced(self) -> bool: ...


@dataclass(frozen=True)
class Trace:
    """What a trace says, read by its format.

    Attributes:
        reasoning: text between the reasoning delimiters; None where there is none.
        answer: text of the last complete answer; None where there is none.
        ok: the trace is as the format wants it.
        why: the first thing that is not, `""` when ok.
    """

    reasoning: str | None
    answer: str | None
    ok: bool
    why: str


@dataclass(frozen=True)
class Segment:
    """Text between two delimiters.

    Attributes:
        state: what the format takes it for.
        start, end: places in the text; the delimiter that ends it stands between its end and the next one's start.
        closed: nothing is missing from it.
    """

    state: State
    start: int
    end: int
    closed: bool


class RoleScanner:
    """Reads a trace piece by piece, says what each piece is as far as can be told by then, and judges the whole.

    `feed` is causal: a piece that completes a delimiter is `template`, earlier pieces of the same delimiter have got
    the role of the text they stand in, and any answer is `answer`. `roles` knows the whole trace, as `trace` does.
    """

    def __init__(self, trace_format: Delimited, reasoning_open: bool = False) -> None:
        self.format = trace_format
        self._text = ""
        self._start = 0  # where the current segment begins
        self._braces = 0  # depth of open braces inside a balanced answer
        self._counted = 0  # braces are counted up to here
        self._segments: list[Segment] = []
        everything = trace_format.reasoning is None and trace_format.answer is None
        self._state: State = "reasoning" if reasoning_open else "answer" if everything else "outside"
        self._longest = max(map(len, (*trace_format.delimiters, *trace_format.end_of_turn)), default=1)

    def feed(self, piece: str) -> Role:
        """Take the text that one token adds; returns the token's role."""
        search_from = max(self._start, len(self._text) - self._longest + 1)
        self._text += piece
        delimiter = False
        while (match := self._next_delimiter(search_from)) is not None:
            start, end, state = match
            closed = state != "ended" or (self._state == "answer" and self._open_ended())
            self._segments.append(Segment(self._state, self._start, start, closed))
            self._start = search_from = end
            self._state, self._braces, self._counted = state, 1, end
            delimiter = True
        return "template" if delimiter else self._role()

    def trace(self) -> Trace:
        """What has been read so far, judged by the format."""
        segments = self._all()
        answer = self._the_answer(segments)
        answers = [one for one in segments if one.state == "answer"]
        complete = answer is not None and self._is_complete(segments[answer])
        why = self._reasoning_fault(segments) or self._answer_fault(answers, complete)
        said = self._said(segments[answer]) if answer is not None and complete else None
        return Trace(self._reasoning(segments, answer), said, not why, why)

    def roles(self, pieces: Sequence[str]) -> tuple[Role, ...]:
        """The roles of the pieces that make up the text that was read, all of it known."""
        segments = self._all()
        kinds = self._kinds(segments)
        roles: list[Role] = []
        at = place = unfinished = 0
        for piece in pieces:
            if not piece:  # part of the character that a later piece ends
                unfinished += 1
                continue
            while segments[place].end <= at and place < len(segments) - 1:
                place += 1
            inside = segments[place].start <= at and at + len(piece) <= segments[place].end
            at += len(piece)
            roles.extend(kinds[place] if inside else "template" for _ in range(unfinished + 1))
            unfinished = 0
        return (*roles, *(kinds[-1] for _ in range(unfinished)))

    def _all(self) -> list[Segment]:
        return [*self._segments, Segment(self._state, self._start, len(self._text), self._open_ended())]

    def _said(self, segment: Segment) -> str:
        return self._text[segment.start : segment.end].strip()

    def _is_complete(self, segment: Segment) -> bool:
        return segment.state == "answer" and segment.closed and bool(self._said(segment))

    def _the_answer(self, segments: Sequence[Segment]) -> int | None:
        """The last complete answer; where none is complete, the last that is begun."""
        complete = [place for place, one in enumerate(segments) if self._is_complete(one)]
        begun = [place for place, one in enumerate(segments) if one.state == "answer"]
        return (complete or begun or [None])[-1]

    def _kinds(self, segments: Sequence[Segment]) -> list[Role]:
        """The role of the text of each segment."""
        answer = self._the_answer(segments)
        free = self.format.reasoning is None
        kinds: list[Role] = []
        for place, one in enumerate(segments):
            before = answer is None or place < answer
            if place == answer:
                kinds.append("answer")
            elif one.state == "reasoning" or (free and before and one.state != "ended"):
                kinds.append("reasoning")
            else:
                kinds.append("template")
        return kinds

    def _reasoning(self, segments: Sequence[Segment], answer: int | None) -> str | None:
        """Text between the delimiters; without any, all text before the answer."""
        if self.format.reasoning is None:
            if answer is not None:
                return self._text[: segments[answer - 1].end].strip() if answer else None
            return self._text[: max((one.end for one in segments if one.state != "ended"), default=0)].strip()
        said = [self._said(one) for one in segments if one.state == "reasoning"]
        return "\n".join(said) if said else None

    def _role(self) -> Role:
        if self._state == "outside":
            before = self.format.reasoning is None and all(one.state != "answer" for one in self._segments)
            return "reasoning" if before else "template"
        return "template" if self._state == "ended" else self._state

    def _open_ended(self) -> bool:
        return self._state == "answer" and (self.format.answer is None or self.format.answer[1] is None)

    def _reasoning_fault(self, segments: Sequence[Segment]) -> str:
        if self.format.reasoning is None:
            return ""
        opening, closing = self.format.reasoning
        reasonings = [one for one in segments if one.state == "reasoning"]
        if not reasonings:
            return f"no {opening!r}"
        if not reasonings[-1].closed:
            return f"{opening!r} is not closed by {closing!r}"
        return f"{opening!r} is opened {len(reasonings)} times" if len(reasonings) > 1 else ""

    def _answer_fault(self, answers: Sequence[Segment], complete: bool) -> str:
        opening, closing = self.format.answer or ("text after the reasoning", None)
        if not answers:
            return f"no {opening!r}"
        if not answers[-1].closed:
            return f"{opening!r} is not closed by {closing!r}"
        return "" if complete else "the answer is empty"

    def _next_delimiter(self, search_from: int) -> tuple[int, int, State] | None:
        """Earliest delimiter that the current state expects (the longest at one place), and the state after it."""
        if self._state == "ended":
            return None
        expected: list[tuple[str, State]] = [(text, "ended") for text in self.format.end_of_turn]
        after: State = "answer" if self.format.answer is None else "outside"
        if self._state == "outside":
            if self.format.reasoning:
                expected.append((self.format.reasoning[0], "reasoning"))
            if self.format.answer:
                expected.append((self.format.answer[0], "answer"))
        elif self._state == "reasoning" and self.format.reasoning:
            expected.append((self.format.reasoning[1], after))
        elif (
            self._state == "answer"
            and self.format.answer
            and self.format.answer[1]
            and not self.format.balanced
        ):
            expected.append((self.format.answer[1], "outside"))
        found: list[tuple[int, int, State]] = [
            (at, -len(text), state) for text, state in expected for at in self._find(text, search_from)
        ]
        if self._state == "answer" and self.format.balanced:
            limit = min((at for at, _, _ in found), default=len(self._text))
            if (closing := self._closing_brace(limit)) is not None:
                return closing, closing + 1, "outside"
        if not found:
            return None
        at, negative_length, state = min(found)
        return at, at - negative_length, state

    def _find(self, delimiter: str, search_from: int) -> Iterable[int]:
        at = self._text.find(delimiter, search_from)
        while at >= 0:
            before, after = self._text[max(at - 1, 0) : at], self._text[at + len(delimiter) :][:1]
            inside_word = (delimiter[0].isalnum() and before.isalnum()) or (
                delimiter[-1].isalnum() and after.isalnum()
            )
            if not inside_word:
                return (at,)
            at = self._text.find(delimiter, at + 1)
        return ()

    def _closing_brace(self, limit: int) -> int | None:
        at = self._counted
        while at < limit:
            if self._text[at] == "\\":  # \{ and \} are no delimiters
                if at + 1 >= limit:
                    break
                at += 2
                continue
            self._braces += {"{": 1, "}": -1}.get(self._text[at], 0)
            if self._braces == 0:
                return at
            at += 1
        self._counted = at
        return None
