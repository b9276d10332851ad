"""The questions and prompts of 2602.12395, for the commands whose `--paper` means its Tables 2 and 3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.options import default, either
from experiments.settings import Questions, QuestionSettings, load_examples
from hooks.errors import FrankenlensError
from interp.fine_grained import PAPER, PAPER_N, described_by_model
from interp.fine_grained.paper import BOXED, INSTRUCTION, SEED, SYSTEM, TAGGED, TOKENS, as_in_paper
from interp.pair.pair import Pair
from interp.questions.examples import Example
from interp.results.store import Store

ASKED = (
    "the paper's sample (RandomState(123), 100 a metric), step by step and boxed, one system message for all models "
    "(the paper's Base has none), at most 8,192 new tokens; images are described by IN and answers graded by rules, "
    "where the paper asks GPT-4o-mini"
)
"""What of the paper's asking is kept, and what cannot be had; for an account."""


@dataclass(frozen=True)
class PaperSettings(QuestionSettings):
    """Questions, models and the paper's way to ask.

    Attributes:
        seed: of everything random; of the paper's sample, 123.
        answer: what stands before the answer, and after it unless it runs to the end of the turn; none where nothing
            does. With --paper the box that its prompt asks for, or the <answer> tags of its system message.
        max_new_tokens: longest generated text.
        system: system message of every prompt; with --paper that of OpenMMReasoner and MMR1, or, given in full, that of
            Revisual-R1 (`interp.fine_grained.paper.SYSTEM`).
        instruction: text that stands before every question; with --paper step by step and boxed.
        paper: the paper's definition.
    """

    seed: int = default(0, paper=SEED)
    answer: tuple[str, ...] = default(("answer",), paper=either("answer", BOXED, TAGGED))
    max_new_tokens: int = default(128, paper=TOKENS)
    system: str | None = default(None, paper=either("system", *SYSTEM.values()))
    instruction: str = default("", paper=INSTRUCTION)
    paper: bool = False


def refuse_own_data(config: PaperSettings) -> None:
    """Refuse data beside the paper's.

    Raises:
        FrankenlensError: `--paper` and `--data` are both given.
    """
    if config.paper and config.data is not None:
        raise FrankenlensError("--paper has its own data; leave out --data, or --paper.")


def paper_questions(config: QuestionSettings, seed: int, metrics: Sequence[str]) -> Questions:
    """The paper's questions of each metric, drawn as it draws them; `task` names the metric.

    Raises:
        Unreachable: a data set cannot be had; nothing stands in for it.
        FrankenlensError: no row can be read.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for metric in metrics:
        own = replace(config, data=Path(PAPER[metric]), n=PAPER_N)
        some, left = load_examples(own, seed, legacy=True)
        examples += [replace(as_in_paper(example), task=metric) for example in some]
        dropped.update({f"{metric}: {reason}": n for reason, n in left.items()})
    return Questions(examples, dropped)


def described(
    pair: Pair, examples: Sequence[Example], max_new_tokens: int, batch_size: int, keep: Store | None = None
) -> list[Example]:
    """The examples of M_v2r described by IN, who is not asked to solve anything; the others as they are."""
    chosen = [example for example in examples if example.task == "v2r"]
    builder = pair.builder.with_instruction("")
    running: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    found = iter(described_by_model(pair.in_, builder, chosen, keep=keep, **running))
    return [next(found) if example.task == "v2r" else example for example in examples]
