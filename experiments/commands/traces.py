"""What IN and RL write, into files that `--traces` of other commands, and others' tools, read.

`frankenlens traces` is the command; the pieces are in `interp.pair.elsewhere`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from experiments.bench import Bench, Planned
from experiments.contract import asked_alone
from experiments.frame import Command, kept
from experiments.options import require_known
from experiments.settings import Questions, QuestionSettings, checkpoints, load_pair, load_questions
from hooks.errors import FrankenlensError
from interp.pair.elsewhere import Continuation, Here, Vllm, Writer
from interp.pair.elsewhere.given import collapsed
from interp.pair.pair import Pair
from interp.plan.work import Work
from interp.prompts import Prompt
from interp.questions.grading import Ungraded, grade
from interp.results.page import Account, Section
from interp.results.store import under
from interp.statistics import interval_text
from interp.statistics.intervals import wilson_interval

MODELS = ("in", "rl")


@dataclass(frozen=True)
class TracesConfig(QuestionSettings):
    """Settings of written traces; the defaults run on the pair that ships with the package.

    Attributes:
        models: whose traces are written: in, rl.
        by: transformers (here, in this process), or vllm, where it is installed (the checkpoints must be folders or
            repository ids that it knows).
        out: folder for in.jsonl and rl.jsonl (a row a question: id, question, prompt_token_ids with one placeholder an
            image, trace_ids, text, finish_reason, model), traces.csv and report.html.
    """

    models: tuple[str, ...] = MODELS
    by: Literal["transformers", "vllm"] = "transformers"
    out: Path = Path("out/traces")


def check(config: TracesConfig) -> None:
    """Refuse models that there are not."""
    require_known("models", config.models, MODELS)
    if not config.models:
        raise FrankenlensError("--models is empty; choose of in, rl.")


def measure(pair: Pair, asked: Questions, config: TracesConfig) -> Iterator[Section]:
    """Greedy traces of both models, and how they ended."""
    prompts = [pair.builder.build(example) for example in asked.examples]
    written = {
        name: _writer(pair, asked, name, config).write(prompts, config.max_new_tokens)
        for name in config.models
    }
    table = pd.DataFrame([_told(name, prompts, texts) for name, texts in written.items()])
    account = Account(
        f"greedy text after each question, by {config.by}, at most {config.max_new_tokens} tokens; special tokens that "
        "no answer holds are never chosen",
        f"{len(prompts)} questions",
        seed=config.seed,
        counts={"examples": len(prompts)},
    )
    lines = {
        name: [_row(name, *one) for one in zip(prompts, texts, strict=True)]
        for name, texts in written.items()
    }
    told = [_sentence(row) for row in table.to_dict("records")]
    yield Section("traces", "What the models write", " ".join(told), account, {"traces": table}, lines=lines)


def _sentence(row: Mapping[Any, Any]) -> str:
    right = interval_text(row["right"], row["right_low"], row["right_high"])
    return (
        f"{row['model']}: share right {right} (n = {row['graded']}), {row['parsed']:.0%} can be read, {row['cut']} of "
        f"{row['n']} cut off, {row['tokens']:.0f} tokens on average."
    )


def _writer(pair: Pair, asked: Questions, name: str, config: TracesConfig) -> Writer:
    if config.by == "vllm":
        return Vllm(checkpoints(config)[:2][MODELS.index(name)])
    return Here(pair.models[name], config.batch_size, under(kept(pair, asked.examples, config), name))


def _row(name: str, prompt: Prompt, written: Continuation) -> Mapping[str, Any]:
    before = prompt.ids[: prompt.n_prompt_tokens]
    return {
        "id": prompt.example.id,
        "question": prompt.example.question,
        "prompt_token_ids": list(collapsed(before, prompt)),
        "trace_ids": list(written.ids),
        "text": prompt.builder.decode(written.ids),
        "finish_reason": written.finish,
        "model": name,
    }


def _told(name: str, prompts: Sequence[Prompt], written: Sequence[Continuation]) -> dict[str, Any]:
    traces = [p.with_tokens(one.ids).trace for p, one in zip(prompts, written, strict=True)]
    grades = [_grade(trace.answer, prompt) for trace, prompt in zip(traces, prompts, strict=True)]
    known = [grade for grade in grades if grade is not None]
    right = wilson_interval(sum(known), len(known))
    return {
        "model": name.upper(),
        "n": len(prompts),
        "right": float(right.value),
        "right_low": float(right.low),
        "right_high": float(right.high),
        "graded": len(known),
        "parsed": sum(trace.ok for trace in traces) / len(traces),
        "cut": sum(one.finish == "length" for one in written),
        "tokens": sum(len(one.ids) for one in written) / len(written),
    }


def _grade(answer: str | None, prompt: Prompt) -> bool | None:
    """None: it cannot be graded."""
    try:
        return bool(grade(answer, prompt.example))
    except Ungraded:
        return None


def work(bench: Bench, config: TracesConfig) -> Iterator[Work]:
    """What `measure` computes, counted and not run."""
    prompts, steps = bench.prompts, bench.trace_tokens
    for name in config.models:
        once = bench.runs().written(f"greedy text of {name.upper()}", prompts, [steps] * len(prompts))
        yield once.times(bench.scale)


COMMAND = Command(TracesConfig, check, load_questions, load_pair, measure, asked_alone, Planned(work))
