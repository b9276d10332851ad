"""Settings that the experiments share: which models, which questions; how they are loaded, and how results are kept."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments import embedded
from hooks.errors import FrankenlensError
from interp.pair.pair import Pair
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.questions.readers import ReadReport, read_gsm8k, read_jsonl, read_math500, read_mathvista
from interp.questions.tasks import REASONING, sample
from interp.results.files import provenance, publishing
from interp.results.page import Section, save_sections

MATHVISTA = ("general-vqa", "math-targeted-vqa")
LISTED = 20  # rows that could not be read, named one by one


@dataclass(frozen=True)
class PairSettings:
    """Which models, and how they are run; the defaults are the triple that ships with the package.

    Attributes:
        in_: IN, a folder or a repository id; the shipped one where neither IN nor RL is given.
        rl: RL, or the folder of a PEFT adapter of IN.
        base: the model IN was made from.
        reasoning: what stands before and after the reasoning in generated text.
        answer: what stands before the answer, and after it unless it runs to the end of the turn.
        max_new_tokens: longest generated text.
        batch_size: prompts a forward.
        seed: of everything random.
        device_map: as in transformers and accelerate ("auto", "cuda", ...).
        dtype: as in transformers; auto keeps the checkpoint's own.
    """

    in_: Annotated[str | None, tyro.conf.arg(name="in")] = None
    rl: str | None = None
    base: str | None = None
    reasoning: tuple[str, str] = ("<think>", "</think>")
    answer: tuple[str, ...] = ("answer",)
    max_new_tokens: int = 128
    batch_size: int = 32
    seed: int = 0
    device_map: str | None = None
    dtype: str = "auto"

    @property
    def trace_format(self) -> TraceFormat:
        """What delimits reasoning and answer."""
        before, *after = self.answer
        return TraceFormat(self.reasoning, (before, after[0] if after else None))


@dataclass(frozen=True)
class DataSettings:
    """Which questions; the synthetic reasoning tasks where none are named.

    Attributes:
        data: JSONL with question, answer and image in each row; or mathvista, mathvista:general-vqa,
            mathvista:math-targeted-vqa, math-500 or gsm8k; the synthetic reasoning tasks where not given.
        images: folder that relative image paths start from; by default that of the data.
        n: prompts to look at.
    """

    data: Path | None = None
    images: Path | None = None
    n: int = 160


def require_sound(config: PairSettings) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    if (config.in_ is None) != (config.rl is None):
        raise FrankenlensError("--in and --rl go together: give both, or neither for the pair that ships.")
    if getattr(config, "images", None) is not None and getattr(config, "data", None) is None:
        raise FrankenlensError("--images is the folder of the images of --data; give --data as well.")
    for name in ("n", "batch_size", "max_new_tokens"):
        given = getattr(config, name, None)
        if given is not None and given < 1:
            raise FrankenlensError(f"--{name.replace('_', '-')} is {given}; give at least 1.")
    if len(config.answer) not in (1, 2):
        raise FrankenlensError(
            rf"--answer has {len(config.answer)} values; give what stands before the answer, and what stands after "
            r"it unless it runs to the end of the turn: --answer '\boxed{' '}'."
        )


def checkpoints(config: PairSettings) -> tuple[str, str, str | None]:
    """Base (None if it is not known), IN and RL, as (in, rl, base); the shipped triple where the settings name none."""
    if config.in_ is None or config.rl is None:
        shipped = (str(embedded.path("in")), str(embedded.path("rl")))
        return *shipped, config.base or str(embedded.path("base"))
    return config.in_, config.rl, config.base


def load_pair(config: PairSettings, with_base: bool = False) -> Pair:
    """The pair that the settings name; the shipped one where they name none.

    Args:
        config: the settings.
        with_base: open Base too where it is known; without, only one that the settings name.
    """
    in_, rl, base = checkpoints(config)
    return Pair.from_pretrained(
        in_,
        rl,
        base if with_base else config.base,
        dtype=config.dtype,
        device_map=config.device_map,
        trace_format=config.trace_format,
    )


def load_examples(
    config: DataSettings, seed: int, tasks: Sequence[str] = REASONING
) -> tuple[list[Example], dict[str, int]]:
    """At most `n` examples, and reason -> number of those that were left out.

    Without data: synthetic tasks in equal shares, from the split that training never saw.

    Raises:
        FrankenlensError: no row can be read, or a public data set cannot be loaded.
    """
    if config.data is None:
        sizes = [config.n // len(tasks) + (i < config.n % len(tasks)) for i in range(len(tasks))]
        drawn = (sample(task, size, seed, "map") for task, size in zip(tasks, sizes, strict=True))
        return [example for some in drawn for example in some], {}
    examples, report = _read(str(config.data), config)
    if report.failures:
        print(report, file=sys.stderr)
    if not examples:
        raise FrankenlensError(
            f"No row of {config.data} can be read; row {report.failures[0].row}: {report.failures[0].reason}."
        )
    dropped = {f"row {failure.row}: {failure.reason}": 1 for failure in report.failures[:LISTED]}
    if len(report.failures) > LISTED:
        dropped["further rows that cannot be read"] = len(report.failures) - LISTED
    if len(examples) > config.n:
        dropped[f"rows beyond the first {config.n} (--n)"] = len(examples) - config.n
    return examples[: config.n], dropped


def _read(name: str, config: DataSettings) -> tuple[list[Example], ReadReport]:
    """The rows of a public data set, or of a JSONL file."""
    which, _, category = name.partition(":")
    if which == "mathvista":
        if category not in ("", *MATHVISTA):
            raise FrankenlensError(f"--data {name}: MathVista has {', '.join(MATHVISTA)}, no {category!r}.")
        return read_mathvista(category=category or None, n=config.n)
    if name in ("math-500", "gsm8k"):
        return {"math-500": read_math500, "gsm8k": read_gsm8k}[name](n=config.n)
    return read_jsonl(name, config.images)


def publish(
    sections: Sequence[Section],
    config: PairSettings,
    out: Path,
    models: Mapping[str, object],
    counts: Mapping[str, int],
) -> None:
    """Write all files of the sections and one page to `out`, all or none, and say what was found.

    Args:
        sections: the outcome.
        config: the settings it was made with.
        out: a folder.
        models: what `Pair.provenance` returns.
        counts: how many examples remained at each step.
    """
    dropped = {
        f"{section.name}: {reason}" if len(sections) > 1 else reason: n
        for section in sections
        for reason, n in section.account.left_out.items()
    }
    made = provenance(models, asdict(config), counts, dropped)
    with publishing(out) as staging:
        save_sections(sections, staging, made)
        written = sorted(path.name for path in staging.iterdir())
    for section in sections:
        print(f"{section.title}: {section.finding}")
    print(f"{out}: {', '.join(written)}")
