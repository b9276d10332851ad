"""Settings that the commands share: which models, which questions, and how they are loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import embedded
from experiments.options import Options, as_option, require_agreement
from hooks.errors import FrankenlensError
from interp.pair.pair import Pair
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.questions.readers import ReadReport, read_gsm8k, read_jsonl, read_math500, read_mathvista
from interp.questions.tasks import REASONING, sample

MATHVISTA = ("general-vqa", "math-targeted-vqa")
LISTED = 20  # rows that could not be read, named one by one
Correction = Literal["holm", "bh"]
CORRECTIONS = {"holm": "Holm", "bh": "Benjamini-Hochberg"}


@dataclass(frozen=True)
class ModelSettings(Options):
    """Which models; the defaults are the triple that ships with the package.

    Attributes:
        in_: IN, a folder or a repository id; the shipped one where neither IN nor RL is given.
        rl: RL, or the folder of a PEFT adapter of IN.
        base: the model IN was made from.
        seed: of everything random.
        out: folder for all that is written.
    """

    in_: Annotated[str | None, tyro.conf.arg(name="in")] = None
    rl: str | None = None
    base: str | None = None
    seed: int = 0
    out: Path = Path("out")


@dataclass(frozen=True)
class PairSettings(ModelSettings):
    """Which models, and how they are run; the defaults are the triple that ships with the package.

    Attributes:
        reasoning: what stands before and after the reasoning in generated text.
        answer: what stands before the answer, and after it unless it runs to the end of the turn.
        max_new_tokens: longest generated text.
        batch_size: prompts a forward.
        device_map: as in transformers and accelerate ("auto", "cuda", ...).
        dtype: as in transformers; auto keeps the checkpoint's own.
        template: file of a Jinja chat template, instead of the processor's own; those of IN and RL may then differ.
        system: system message of every prompt.
        accept: differences of the models that are taken as they are, by the names that the refusal gives them.
    """

    reasoning: tuple[str, str] = ("<think>", "</think>")
    answer: tuple[str, ...] = ("answer",)
    max_new_tokens: int = 128
    batch_size: int = 32
    device_map: str | None = None
    dtype: str = "auto"
    template: Path | None = None
    system: str | None = None
    accept: tuple[str, ...] = ()

    @property
    def trace_format(self) -> TraceFormat:
        """What delimits reasoning and answer."""
        before, *after = self.answer
        return TraceFormat(self.reasoning, (before, after[0] if after else None))

    @property
    def running(self) -> dict[str, Any]:
        """How a method generates: the arguments that nearly all of them take."""
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}


@dataclass(frozen=True)
class DataSettings:
    """Which questions; the synthetic reasoning tasks where none are named.

    Attributes:
        data: JSONL with question, answer and, if it has one, image in each row; or mathvista, mathvista:general-vqa,
            mathvista:math-targeted-vqa, math-500 or gsm8k; the synthetic reasoning tasks where not given.
        images: folder that relative image paths start from; by default that of the data.
        n: prompts to look at.
    """

    data: Path | None = None
    images: Path | None = None
    n: int = 160


@dataclass(frozen=True)
class QuestionSettings(PairSettings, DataSettings):
    """Which models, how they are run, and which questions they are asked."""


class NoImages(FrankenlensError):
    """What was asked needs images, and the questions have none, or the models see none."""


@dataclass(frozen=True)
class Questions:
    """What is asked of the models.

    Attributes:
        examples: the questions.
        left_out: reason to number of those that cannot be asked.
    """

    examples: Sequence[Example]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def in_words(self) -> bool:
        """Whether no question has an image, as of a model that reads text alone."""
        return not any(example.images for example in self.examples)


def require_sound(config: ModelSettings) -> None:
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
            raise FrankenlensError(f"{as_option(name)} is {given}; give at least 1.")
    template = getattr(config, "template", None)
    if template is not None and not template.is_file():
        raise FrankenlensError(
            f"--template {template}: there is no such file; give a file of a Jinja chat template."
        )
    answer = getattr(config, "answer", ("answer",))
    if len(answer) not in (1, 2):
        raise FrankenlensError(
            rf"--answer has {len(answer)} values; give what stands before the answer, and what stands after "
            r"it unless it runs to the end of the turn: --answer '\boxed{' '}'."
        )
    require_agreement(config)


def checkpoints(config: ModelSettings) -> tuple[str, str, str | None]:
    """Base (None if it is not known), IN and RL, as (in, rl, base); the shipped triple where the settings name none."""
    if config.in_ is None or config.rl is None:
        shipped = (str(embedded.path("in")), str(embedded.path("rl")))
        return *shipped, config.base or str(embedded.path("base"))
    return config.in_, config.rl, config.base


def load_pair(config: PairSettings) -> Pair:
    """IN and RL; Base only where the settings name one."""
    return _opened(config, config.base)


def load_triple(config: PairSettings) -> Pair:
    """IN, RL and, where it is known, Base."""
    return _opened(config, checkpoints(config)[2])


def _opened(config: PairSettings, base: str | None) -> Pair:
    in_, rl, _ = checkpoints(config)
    loading: dict[str, Any] = {"dtype": config.dtype, "device_map": config.device_map}
    prompts = {"template": _template(config), "system": config.system, "accept": config.accept}
    return Pair.from_pretrained(in_, rl, base, trace_format=config.trace_format, **prompts, **loading)


def _template(config: PairSettings) -> str | None:
    return None if config.template is None else config.template.read_text(encoding="utf-8")


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


def load_questions(config: QuestionSettings) -> Questions:
    """`load_examples`, for a command that asks nothing else."""
    return Questions(*load_examples(config, config.seed))


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
