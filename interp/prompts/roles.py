"""Roles of tokens, and the format of a reasoning trace that the roles of generated tokens follow from.

What a trace says and the roles of its tokens come from one reading of its text (`interp.prompts.scanner`): the last
complete answer is *the* answer, and what follows it is `template`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hooks.errors import FrankenlensError
from interp.prompts.scanner import Role, RoleScanner, Trace

ROLES: tuple[Role, ...] = ("image", "question", "reasoning", "answer", "template")
ROLE_CODES: dict[str, int] = {role: code for code, role in enumerate(ROLES)}
PADDING_CODE = -1
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<end_of_utterance>", "<end_of_turn>", "<|eot_id|>", "</s>")


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
        return _reading(self, text, reasoning_open).trace()

    def roles(self, pieces: Sequence[str], reasoning_open: bool = False) -> tuple[Role, ...]:
        r"""The role of each piece of a trace, the whole trace known.

        A piece that touches a delimiter is `template`, also where the delimiter takes several pieces. Of several
        answers the last complete one has the role `answer`; those before it are reasoning where all text before the
        answer is, otherwise `template`. `RoleScanner` says what can be told while a trace is written.

        Arguments:
            pieces: the text that each token adds; `""` for one that ends inside a character.
            reasoning_open: the prompt already ended with the opening delimiter.

        Example:
            >>> fl.TraceFormat(None, (r"\boxed{", "}")).roles(["2 or 3", " \\", "boxed{", "3", "}", "."])
            ('reasoning', 'template', 'template', 'answer', 'template', 'template')
        """
        return _reading(self, "".join(pieces), reasoning_open).roles(pieces)


def _reading(trace_format: TraceFormat, text: str, reasoning_open: bool) -> RoleScanner:
    scanner = RoleScanner(trace_format, reasoning_open)
    scanner.feed(text)
    return scanner


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
