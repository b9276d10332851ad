"""Roles of tokens, and the format of a reasoning trace that the roles of generated tokens follow from.

Roles are causal: the role of a token depends on the tokens up to and including it, never on later ones, so that
truncating or extending a trace leaves every earlier role as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hooks.errors import FrankenlensError

Role = Literal["image", "question", "reasoning", "answer", "template"]
ROLES: tuple[Role, ...] = ("image", "question", "reasoning", "answer", "template")
ROLE_CODES: dict[str, int] = {role: code for code, role in enumerate(ROLES)}
PADDING_CODE = -1
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<end_of_utterance>", "<end_of_turn>", "<|eot_id|>", "</s>")

_State = Literal["outside", "reasoning", "answer", "ended"]


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
class TraceFormat:
    r"""What delimits reasoning and answer in generated text. Declared per pair.

    A delimiter is any string: a special token, `\boxed{`, or a word. A word (it begins or ends with a letter or
    digit) counts only as a whole word, as far as the text up to the end of the current token tells.

    Arguments:
        reasoning: opening and closing delimiter; None: all text before the answer is reasoning.
        answer: opening and closing delimiter. Closing None: the answer runs to the end of the turn. An opening that
            ends in `{` with the closing `}` is read with balanced braces. None: the answer is all text after the
            reasoning.
        end_of_turn: strings after which nothing belongs to the trace.

    Raises:
        FrankenlensError: an empty delimiter.

    Example:
        >>> trace = fl.TraceFormat().parse("<think> 2 red , 1 blue </think> answer 3")
        >>> trace.reasoning, trace.answer, trace.ok
        ('2 red , 1 blue', '3', True)
        >>> boxed = fl.TraceFormat(answer=(r"\boxed{", "}"))
        >>> boxed.parse(r"<think> half of 3 </think> \boxed{\frac{3}{2}}").answer
        '\\frac{3}{2}'
        >>> boxed.parse("<think> half of 3").why
        "'<think>' is not closed by '</think>'"
    """

    reasoning: tuple[str, str] | None = ("<think>", "</think>")
    answer: tuple[str, str | None] | None = ("answer", None)
    end_of_turn: tuple[str, ...] = END_OF_TURN

    def __post_init__(self) -> None:
        if any(text is not None and not text.strip() for text in self.delimiters):
            raise FrankenlensError(
                f"a delimiter of the trace format is empty: reasoning={self.reasoning!r}, answer={self.answer!r}. "
                "Give text, or None for a part without delimiters."
            )

    @property
    def delimiters(self) -> tuple[str, ...]:
        """All delimiters of reasoning and answer."""
        return tuple(
            text for pair in (self.reasoning, self.answer) if pair for text in pair if text is not None
        )

    @property
    def balanced(self) -> bool:
        r"""The answer ends at the brace that matches the one it opened with (`\boxed{...}`)."""
        return self.answer is not None and self.answer[0].endswith("{") and self.answer[1] == "}"

    def render(self, reasoning: str | None, answer: str) -> str:
        """The text of a trace that says `reasoning` and `answer` in this format."""
        parts = []
        if reasoning is not None:
            parts += [self.reasoning[0], reasoning, self.reasoning[1]] if self.reasoning else [reasoning]
        if self.answer is None:
            parts.append(answer)
        elif self.balanced:
            parts.append(f"{self.answer[0]}{answer}}}")
        else:
            parts += [self.answer[0], answer, *([self.answer[1]] if self.answer[1] else [])]
        return " ".join(parts)

    def parse(self, text: str, reasoning_open: bool = False) -> Trace:
        """Read a trace. One that does not parse is returned with the reason, and with the answer if it has one.

        Arguments:
            text: generated text, end-of-turn tokens included or not.
            reasoning_open: the prompt already ended with the opening delimiter.
        """
        scanner = RoleScanner(self, reasoning_open)
        scanner.feed(text)
        return scanner.trace()


class RoleScanner:
    """Reads a trace piece by piece and says the role of each piece.

    A piece that completes a delimiter is `template`. Where a delimiter takes several tokens, the earlier ones keep
    the role of the text they stand in: it cannot be known yet what they will become.
    """

    def __init__(self, trace_format: TraceFormat, reasoning_open: bool = False) -> None:
        self.format = trace_format
        self._text = ""
        self._start = 0  # where the current segment begins
        self._braces = 0  # depth of open braces inside a balanced answer
        self._counted = 0  # braces are counted up to here
        self._segments: list[tuple[_State, str, bool]] = []
        everything = trace_format.reasoning is None and trace_format.answer is None
        self._state: _State = "reasoning" if reasoning_open else "answer" if everything else "outside"
        self._longest = max(map(len, (*trace_format.delimiters, *trace_format.end_of_turn)), default=1)

    def feed(self, piece: str) -> Role:
        """Take the text that one token adds; returns the token's role."""
        search_from = max(self._start, len(self._text) - self._longest + 1)
        self._text += piece
        delimiter = False
        while (match := self._next_delimiter(search_from)) is not None:
            start, end, state = match
            closed = state != "ended" or (self._state == "answer" and self._open_ended())
            self._segments.append((self._state, self._text[self._start : start], closed))
            self._start = search_from = end
            self._state, self._braces, self._counted = state, 1, end
            delimiter = True
        return "template" if delimiter else self._role()

    def trace(self) -> Trace:
        """What has been read so far, judged by the format."""
        segments = [*self._segments, (self._state, self._text[self._start :], False)]
        reasonings = [(text.strip(), closed) for state, text, closed in segments if state == "reasoning"]
        if self.format.reasoning is None:
            reasonings = [(text.strip(), closed) for state, text, closed in segments if state == "outside"][
                :1
            ]
        answers = [
            (text.strip(), closed or self._open_ended()) for s, text, closed in segments if s == "answer"
        ]
        complete = [text for text, closed in answers if closed and text]
        why = self._reasoning_fault(reasonings) or self._answer_fault(answers, complete)
        reasoning = "\n".join(text for text, _ in reasonings) if reasonings else None
        return Trace(reasoning, complete[-1] if complete else None, not why, why)

    def _role(self) -> Role:
        if self._state == "outside":
            return "reasoning" if self.format.reasoning is None else "template"
        return "template" if self._state == "ended" else self._state

    def _open_ended(self) -> bool:
        return self.format.answer is None or self.format.answer[1] is None

    def _reasoning_fault(self, reasonings: list[tuple[str, bool]]) -> str:
        if self.format.reasoning is None:
            return ""
        opening, closing = self.format.reasoning
        if not reasonings:
            return f"no {opening!r}"
        if not reasonings[-1][1]:
            return f"{opening!r} is not closed by {closing!r}"
        return f"{opening!r} is opened {len(reasonings)} times" if len(reasonings) > 1 else ""

    def _answer_fault(self, answers: list[tuple[str, bool]], complete: list[str]) -> str:
        opening, closing = self.format.answer or ("text after the reasoning", None)
        if not answers:
            return f"no {opening!r}"
        if not answers[-1][1]:
            return f"{opening!r} is not closed by {closing!r}"
        return "" if complete else "the answer is empty"

    def _next_delimiter(self, search_from: int) -> tuple[int, int, _State] | None:
        """Earliest delimiter that the current state expects (the longest at one place), and the state after it."""
        if self._state == "ended":
            return None
        expected: list[tuple[str, _State]] = [(text, "ended") for text in self.format.end_of_turn]
        after: _State = "answer" if self.format.answer is None else "outside"
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
        found: list[tuple[int, int, _State]] = [
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


def count_faults(traces: Iterable[Trace]) -> dict[str, int]:
    """How many traces do not parse, by reason, the commonest first.

    Example:
        >>> form = fl.TraceFormat()
        >>> fl.count_faults(map(form.parse, ["<think> 2 </think> answer 2", "answer 2", "answer 3", "<think> 2"]))
        {"no '<think>'": 2, "'<think>' is not closed by '</think>'": 1}
    """
    counts: dict[str, int] = {}
    for trace in traces:
        if not trace.ok:
            counts[trace.why] = counts.get(trace.why, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
