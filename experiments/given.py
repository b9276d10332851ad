"""Traces that were written elsewhere, as an option of the commands that read traces."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.settings import LISTED, Questions, QuestionSettings
from hooks.errors import FrankenlensError, shown
from hooks.whereabouts import require_file
from interp.decision import followed
from interp.decision.followed import LEAST
from interp.pair.elsewhere import Traces, read_traces
from interp.pair.pair import Pair
from interp.questions.examples import Example
from interp.results.page import Section

MODELS = ("in", "rl")
TRIED = 32
"""Traces along which the model is run before anything is measured."""


@dataclass(frozen=True)
class TraceSettings(QuestionSettings):
    """Which models, which questions, and where what the models wrote comes from.

    Attributes:
        traces: what the models wrote, where it was written elsewhere (by vLLM, SGLang, lm-eval, a trainer's log; text
            or token ids, `interp.pair.elsewhere.rows`): in=FILE rl=FILE, or one FILE whose rows say which model's they
            are. Of a model that is not named, traces are written here.
        foreign: take traces of whose tokens the model would have chosen less than half.
    """

    traces: tuple[str, ...] = ()
    foreign: bool = False

    @property
    def trace_files(self) -> dict[str, Path]:
        """Model to file.

        Raises:
            FrankenlensError: a model is named twice, or is none of the pair's.
        """
        found: dict[str, Path] = {}
        for one in self.traces:
            name, equals, path = one.partition("=")
            some = {name: Path(path)} if equals and name in MODELS else dict.fromkeys(MODELS, Path(one))
            if twice := set(some) & set(found):
                raise FrankenlensError(
                    f"--traces names the traces of {sorted(twice)[0].upper()} twice; give in=FILE rl=FILE, or one FILE"
                )
            found |= some
        return found


def require_trace_files(config: TraceSettings) -> None:
    """Refuse files that are not there.

    Raises:
        FrankenlensError: names the file.
    """
    for path in dict.fromkeys(config.trace_files.values()):
        require_file(path, "JSON lines of traces: in=FILE rl=FILE, or one FILE", "--traces")


def fingerprints(config: TraceSettings) -> dict[str, str]:
    """Model to what is in its file: parts that are finished depend on it."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in config.trace_files.items()}


def with_traces(pair: Pair, asked: Questions, config: TraceSettings) -> Questions:
    """The questions that have their traces, and these; each model is run along some of its own.

    Raises:
        FrankenlensError: no question has a trace of every model named, or a model would not have written what is given
            as its own.
    """
    files = config.trace_files
    if not files:
        return asked
    prompts = [pair.builder.build(example) for example in asked.examples]
    one_file = len(set(files.values())) == 1 and len(files) > 1
    given = {
        name: read_traces(path, prompts, name, config.encoding, one_file) for name, path in files.items()
    }
    for name, traces in given.items():
        _tell_of_others(name, traces)
    kept: list[Example] = []
    left_out: Counter[str] = Counter()
    for example in asked.examples:
        reasons = [
            f"{name.upper()}'s trace: {traces.left_out[example.id]}"
            for name, traces in given.items()
            if example.id not in traces.ids
        ]
        if reasons:
            told = reasons[0] if len(left_out) < LISTED else "further questions without a trace"
            left_out[told] += 1
            print(f"left out: {example.id}: {reasons[0]}", file=sys.stderr)
        else:
            kept.append(example)
    if not kept:
        first = next(iter(left_out))
        raise FrankenlensError(f"no question has a trace of each model in --traces; the first: {first}")
    for told in _followed(pair, kept, given, config):
        print(told, file=sys.stderr)
    return replace(asked, examples=kept, left_out={**asked.left_out, **left_out}, traces=given)


def _tell_of_others(name: str, traces: Traces) -> None:
    """Rows that are nobody's reply, as of a misspelt id, and those that hold none."""
    for row, why in list(traces.unread.items())[:LISTED]:
        print(f"{name.upper()}'s traces: row {row} holds no reply: {why}", file=sys.stderr)
    if n := len(traces.strangers):
        first = ", ".join(map(str, traces.strangers[:LISTED]))
        print(
            f"{name.upper()}'s traces: {n} rows answer none of the questions asked: {first}", file=sys.stderr
        )


def told_of(section: Section, traces: Mapping[str, Traces]) -> Section:
    """The section whose account says where the traces are from."""
    files = ", ".join(f"{name.upper()}'s from {shown(given.source)}" for name, given in traces.items())
    definition = f"{section.account.definition}; traces written elsewhere: {files}"
    return replace(section, account=replace(section.account, definition=definition))


def _followed(
    pair: Pair, examples: Sequence[Example], given: Mapping[str, Traces], config: TraceSettings
) -> Iterator[str]:
    some = [examples[i * len(examples) // TRIED] for i in range(TRIED)] if len(examples) > TRIED else examples
    prompts = [pair.builder.build(example) for example in some]
    for name, traces in given.items():
        texts = [p.with_tokens(ids) for p, ids in zip(prompts, traces.of(prompts), strict=True)]
        found = followed(pair.models[name], texts, config.batch_size)
        told = f"{name.upper()}'s traces of {shown(traces.source)}: {found}"
        if n := len(traces.open_ended & {example.id for example in examples}):
            told += f". Of {n} nobody says whether they ended or were cut off (finish_reason)"
        if found.share < LEAST and not config.foreign:
            raise FrankenlensError(
                f"{told}. That is less than {LEAST:.0%}, as of another model, prompt or tokenizer. Give this model's "
                "traces, its --system, --template and --instruction; or --foreign to read them all the same."
            )
        if traces.sampled or found.n_greedy < found.n_traces:
            told += (
                ". Decisions are taken only at tokens that the model would choose itself, and what is said of traces "
                "is said of these, not of greedy ones"
            )
        yield told
