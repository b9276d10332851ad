"""What every command asks of its input before it measures: questions that can be asked, and traces that can be read."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from experiments.given import TraceSettings, with_traces
from experiments.settings import PairSettings, Questions
from hooks.errors import FrankenlensError
from interp.pair.elsewhere import Traces
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.prompts import Prompt, PromptBuilder
from interp.prompts.proposals import proposed
from interp.prompts.roles import TraceFormat, count_faults
from interp.questions.examples import Example

SAMPLE = 32
"""Questions whose traces are tried, spread over all of them."""
SHOWN = 300  # characters of a trace, half of them from its end

Asked = TypeVar("Asked")


def admitted(pair: Any, asked: Asked, config: Any) -> Asked:
    """What can be asked of a pair, if both its models write what can be read; what asks no pair anything, as it is.

    Raises:
        FrankenlensError: no question can be asked, or too many traces cannot be read.
    """
    fit = asked_alone(pair, asked, config)
    if not isinstance(pair, Pair) or not isinstance(fit, Questions) or not fit.examples:
        return fit
    if isinstance(config, TraceSettings):
        fit = with_traces(pair, fit, config)
    require_readable(pair, pair.builder, fit.examples, config, given=fit.traces)
    return fit


def asked_alone(pair: Any, asked: Asked, config: Any) -> Asked:
    """What can be asked of a pair, whatever it then writes.

    Raises:
        FrankenlensError: no question can be asked.
    """
    if not isinstance(pair, Pair) or not isinstance(asked, Questions) or not asked.examples:
        return asked
    examples, left_out = askable(pair.builder, asked.examples)
    return replace(asked, examples=examples, left_out={**asked.left_out, **left_out})


def askable(builder: PromptBuilder, examples: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
    """The examples that a prompt can be made of, and reason -> number of the others.

    Raises:
        FrankenlensError: there is no such example; the reason is that of the first.
    """
    kept: list[Example] = []
    refused: list[FrankenlensError] = []
    for example in examples:
        try:
            builder.build(example)
        except FrankenlensError as error:
            refused.append(error)
        else:
            kept.append(example)
    if not kept:
        raise refused[0]
    for error in refused:
        print(f"left out: {error}", file=sys.stderr)
    return kept, dict(Counter(map(str, refused)))


@dataclass(frozen=True)
class _Tried:
    """What a model wrote on the sample."""

    name: str
    traces: tuple[Prompt, ...]
    n_cut: int

    @property
    def unread(self) -> list[Prompt]:
        """Those that do not parse."""
        return [prompt for prompt in self.traces if not _is_read(prompt)]

    def __str__(self) -> str:
        text = f"{len(self.traces) - len(self.unread)} of {self.name}'s {len(self.traces)} traces can be read"
        faults = [f"{n}: {why}" for why, n in count_faults(prompt.trace for prompt in self.unread).items()]
        faults += [f"{self.n_cut} were cut off at --max-new-tokens"] if self.n_cut else []
        return f"{text} ({'; '.join(faults)})" if faults else text


def require_readable(
    pair: Pair,
    builder: PromptBuilder,
    examples: Sequence[Example],
    config: PairSettings,
    models: Sequence[str] = ("in", "rl"),
    given: Mapping[str, Traces] | None = None,
) -> None:
    """Let models of a pair write on some of the questions, tell how many traces can be read, and show one.

    Arguments:
        builder: makes the prompts; its format is what reads.
        examples: all questions; `SAMPLE` of them are tried.
        config: `unparsed`, the share that may be unreadable, and the settings of generation.
        models: whose traces are going to be read.
        given: their traces, of those whose were written elsewhere.

    Raises:
        FrankenlensError: more than that of one model; says how the traces would be read, or how to go on.
    """
    some = (
        [examples[i * len(examples) // SAMPLE] for i in range(SAMPLE)] if len(examples) > SAMPLE else examples
    )
    prompts = [builder.build(example) for example in some]
    tried = [_written(pair, name, prompts, config, (given or {}).get(name)) for name in models]
    unread = [prompt for one in reversed(tried) for prompt in one.unread]
    shown = (unread or tried[-1].traces)[0]
    told = f"{'; '.join(map(str, tried))}. One of them: {_short(shown)}"
    if max(len(one.unread) / len(one.traces) for one in tried) <= config.unparsed:
        print(told, file=sys.stderr)
        return
    raise FrankenlensError(
        f"too many traces cannot be read by {as_options(builder.trace_format)}: {told}. "
        f"{_ways_out(tried, config)}, or --unparsed 1 to go on all the same."
    )


def _written(
    pair: Pair, name: str, prompts: Sequence[Prompt], config: PairSettings, given: Traces | None
) -> _Tried:
    if given is None:
        written = greedy(pair.models[name], prompts, config.max_new_tokens, config.batch_size)
    else:
        written = given.of(prompts)
    traces = tuple(prompt.with_tokens(ids) for prompt, ids in zip(prompts, written, strict=True))
    cut = [
        prompt
        for prompt, ids in zip(traces, written, strict=True)
        if not _is_read(prompt) and ids and ids[-1] not in prompt.builder.end_ids
    ]
    return _Tried(name.upper(), traces, len(cut))


def _is_read(prompt: Prompt) -> bool:
    """Whether a trace parses, or is an answer given straight away, which has no reasoning to be found."""
    trace, answer = prompt.trace, prompt.builder.trace_format.answer
    if trace.ok or trace.reasoning is not None or trace.answer is None or answer is None:
        return trace.ok
    return prompt.builder.decode(prompt.trace_ids).lstrip().startswith(answer[0])


def _ways_out(tried: Sequence[_Tried], config: PairSettings) -> str:
    traces = [prompt for one in tried for prompt in one.traces]
    n_cut, n_unread = sum(one.n_cut for one in tried), sum(len(one.unread) for one in tried)
    if 2 * n_cut > n_unread:
        return (
            f"Give more than --max-new-tokens {config.max_new_tokens}, at which {n_cut} of them were cut off"
        )
    own = traces[0].builder.trace_format
    found = proposed(
        own, [(prompt.prompt_text, prompt.builder.decode(prompt.trace_ids)) for prompt in traces]
    )
    if found is None:
        return "Give the delimiters that the models write (--reasoning, --answer; none where there are none)"
    return f"{found.n} of {len(traces)} would be read with {as_options(found.trace_format)}: give that"


def as_options(trace_format: TraceFormat) -> str:
    """A format as a command line says it."""
    words = []
    for name, delimiters in (("--reasoning", trace_format.reasoning), ("--answer", trace_format.answer)):
        words += [name, *(text for text in delimiters or ("none",) if text is not None)]
    return shlex.join(words)


def _short(prompt: Prompt) -> str:
    text = prompt.builder.decode(prompt.trace_ids)
    half = SHOWN // 2
    return repr(text if len(text) <= SHOWN else f"{text[:half]} … {text[-half:]}")
