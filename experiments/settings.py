"""Settings that the commands share: which models, which questions, and how they are loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import embedded
from experiments.options import Only, Options, as_option, default, require_agreement, require_names
from hooks.errors import FrankenlensError, one_line, shown
from hooks.memory import parse_bytes
from hooks.whereabouts import absent, require_checkpoint, require_file, require_folder
from interp.pair.elsewhere import Traces
from interp.pair.pair import Pair
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example, once_each
from interp.questions.readers import (
    Draw,
    Fields,
    ReadReport,
    Seen,
    read_gsm8k,
    read_jsonl,
    read_math500,
    read_mathvista,
)
from interp.questions.readers.draw import Split
from interp.questions.readers.hub import Unreachable
from interp.questions.readers.pictures import PIXELS
from interp.questions.readers.tables import KINDS
from interp.questions.tasks import REASONING, sample

MATHVISTA = ("general-vqa", "math-targeted-vqa")
PUBLIC = ("mathvista", *(f"mathvista:{one}" for one in MATHVISTA), "math-500", "gsm8k")
NONE = ("none",)  # no delimiters
IMAGE = "image"  # examples of one image hang together
COPIES = ("mathvista", "math-500", "gsm8k")
LISTED = 20  # rows that could not be read, named one by one
_FILES = {
    "template": "a file of a Jinja chat template",
    "map": "map.nc, which `frankenlens map --out DIR` writes to DIR",
}
_FOLDERS = dict.fromkeys(("images", "train_images"), "the folder that the rows' image paths start from")
_ROWS = {
    "data": ("file", f"{KINDS}, or {', '.join(PUBLIC)}"),
    "train": ("file", f"{KINDS}, or {', '.join(PUBLIC)}"),
    "functions_data": ("folder", "the folder of the paper's vision-function set"),
}
"""Options that name what is read, and what to give to each."""
Correction = Literal["holm", "bh"]
CORRECTIONS = {"holm": "Holm", "bh": "Benjamini-Hochberg"}


@dataclass(frozen=True)
class ModelSettings(Options):
    """Which models; the defaults are the triple that ships with the package.

    Attributes:
        in_: IN, a folder or a repository id; the shipped one where neither IN nor RL is given.
        rl: RL: a checkpoint, a step of a run as its trainer left it (FSDP or DCP shards), or a PEFT adapter of IN.
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
        reasoning: what stands before and after the reasoning in generated text; none where nothing does.
        answer: what stands before the answer, and after it unless it runs to the end of the turn; none where nothing
            does, so that the answer is all that follows the reasoning.
        unparsed: share of either model's traces that may fail to be read so, on a sample, before anything is measured;
            1 to go on whatever they say.
        max_new_tokens: longest generated text.
        batch_size: prompts a forward, at most.
        max_memory: bytes, or such as 20GiB, that runs may take on a device beside the models; by default half of what
            is free.
        device_map: as in transformers and accelerate ("auto", "cuda", ...).
        dtype: as in transformers; auto keeps the checkpoint's own.
        one_resident: keep RL as what differs from IN, in IN's memory, and change over as each is run: the same results
            in about half of the memory where RL changed few entries, in more time.
        template: file of a Jinja chat template, instead of the processor's own; those of IN and RL may then differ.
        system: system message of every prompt.
        instruction: text that stands before every question, in the same turn.
        accept: differences of the models that are taken as they are, by the names that the refusal gives them.
        ray: share the work among the workers of a Ray cluster, a pair each: auto (the cluster that this machine is of),
            the host:port of one, or local (this machine alone, for the length of the run). The numbers are the same.
        gpus_per_model: GPUs of every worker; more than one where --device-map spreads the pair over several.
    """

    reasoning: tuple[str, ...] = ("<think>", "</think>")
    answer: tuple[str, ...] = ("answer",)
    unparsed: float = 0.2
    max_new_tokens: int = 128
    batch_size: int = 32
    max_memory: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    one_resident: bool = False
    template: Path | None = None
    system: str | None = None
    instruction: str = ""
    accept: tuple[str, ...] = ()
    ray: str | None = None
    gpus_per_model: int = default(0, only=Only("--ray", lambda config: config.ray))

    @property
    def trace_format(self) -> TraceFormat:
        """What delimits reasoning and answer."""
        reasoning = None if self.reasoning == NONE else (self.reasoning[0], self.reasoning[1])
        before, *after = self.answer
        answer = None if self.answer == NONE else (before, after[0] if after else None)
        return TraceFormat(reasoning, answer)

    @property
    def running(self) -> dict[str, Any]:
        """How a method generates: the arguments that nearly all of them take."""
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}


@dataclass(frozen=True)
class DataSettings:
    """Which questions; the synthetic reasoning tasks where none are named.

    Attributes:
        data: JSONL (or a JSON array, CSV, parquet) with question, answer and, if it has one, image in each row; or
            mathvista, mathvista:general-vqa, mathvista:math-targeted-vqa, math-500 or gsm8k; the synthetic reasoning
            tasks where not given.
        images: folder that relative image paths start from; by default that of the data.
        fields: names of the fields of the data, where they are others: question=problem answer=solution image=images
            (and id, task, reasoning, cluster).
        images_anywhere: rows may name images outside of that folder, by absolute paths or by "..".
        max_pixels: of an image; a row with a larger one is left out.
        encoding: of the data's text: gbk, latin-1, ...; by default UTF-8, or the UTF-16 that a file shows.
        split: half of the data, explore or confirm: what is found on the one is confirmed on the other, whatever n and
            seed.
        n: prompts to look at; rows of data are drawn by --seed.
        copies: folder with local copies of the public data sets, for a machine without a network: mathvista, math-500,
            gsm8k, each a parquet, JSON or Arrow file of that name, or a folder that `save_to_disk` wrote; by default
            they come from the hub or its cache.
        cluster: what makes examples hang together, so that intervals and tests count them as one: image, or a field of
            the data (scene, video).
    """

    data: Path | None = None
    images: Path | None = None
    images_anywhere: bool = False
    max_pixels: int = PIXELS
    fields: tuple[str, ...] = ()
    encoding: str | None = None
    split: Split = "all"
    n: int = 160
    copies: Path | None = None
    cluster: str = IMAGE

    @property
    def access(self) -> dict[str, Any]:
        """Which images may be opened: the arguments that all readers take."""
        return {"images_anywhere": self.images_anywhere, "max_pixels": self.max_pixels}


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
        traces: of each model whose traces were written elsewhere.
    """

    examples: Sequence[Example]
    left_out: Mapping[str, int] = field(default_factory=dict)
    traces: Mapping[str, Traces] = field(default_factory=dict)

    @property
    def in_words(self) -> bool:
        """Whether no question has an image, as of a model that reads text alone."""
        return not any(example.images for example in self.examples)


_WHOLE = {"n": 10**7, "batch_size": 10**6, "max_new_tokens": 10**6, "max_pixels": 2**40}
"""Options that are whole numbers from 1 on, and what is more than anybody means by them."""


def require_sound(config: ModelSettings) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        FrankenlensError: says which, and what to give instead.
    """
    require_names(config)
    if (config.in_ is None) != (not config.rl):
        raise FrankenlensError("--in and --rl go together: give both, or neither for the pair that ships.")
    for name in ("in_", "rl", "base"):
        given = getattr(config, name) or ()
        for one in (
            (given,) if isinstance(given, str) else given
        ):  # of a run, several checkpoints or a pattern
            if isinstance(given, str) or not has_magic(one):
                require_checkpoint(one, as_option(name))
    _require_data(config)
    for name, most in _WHOLE.items():
        given = getattr(config, name, None)
        if given is not None and not 1 <= given <= most:
            side = "at least 1" if given < 1 else f"at most {most:,}"
            raise FrankenlensError(f"{as_option(name)} is {shown(given)}; give {side}.")
    if not 0 <= config.seed < 2**32:
        raise FrankenlensError(f"--seed is {shown(config.seed)}; give a number from 0 to {2**32 - 1}.")
    if isinstance(config, PairSettings):
        _require_format(config)
        try:
            parse_bytes(config.max_memory)
        except FrankenlensError as error:
            raise FrankenlensError(f"--max-memory: {error}") from error
    require_agreement(config)


def require_there(config: ModelSettings) -> None:
    """Refuse files and folders that are not there, whichever option names them.

    Raises:
        FrankenlensError: "no such file" or "no such folder", with the option, what is there, and what to give.
    """
    given = {name: path for name in (*_FILES, *_FOLDERS, *_ROWS) if (path := getattr(config, name, None))}
    for name, path in given.items():
        if name in _FILES:
            require_file(path, _FILES[name], as_option(name))
        elif name in _FOLDERS:
            require_folder(path, _FOLDERS[name], as_option(name))
        elif not os.path.exists(path) and not is_public(str(path)):
            raise FrankenlensError(absent(path, *_ROWS[name], as_option(name)))


def _require_format(config: PairSettings) -> None:
    if len(config.reasoning) != 2 and config.reasoning != NONE:
        raise FrankenlensError(
            f"--reasoning has {len(config.reasoning)} values; give what stands before the reasoning and what stands "
            "after it, or none where nothing does."
        )
    if len(config.answer) not in (1, 2):
        raise FrankenlensError(
            rf"--answer has {len(config.answer)} values; give what stands before the answer, and what stands after "
            r"it unless it runs to the end of the turn: --answer '\boxed{' '}'; or none where nothing does."
        )
    if not 0 <= config.unparsed <= 1:
        raise FrankenlensError(f"--unparsed is a share of the traces, 0 to 1, not {config.unparsed:g}.")


def _require_data(config: ModelSettings) -> None:
    """Options that say how a file is read go with a file."""
    data = getattr(config, "data", None)
    if getattr(config, "images", None) is not None and data is None:
        raise FrankenlensError("--images is the folder of the images of --data; give --data as well.")
    for name, usual in (("images_anywhere", False), ("max_pixels", PIXELS)):
        if getattr(config, name, usual) != usual and data is None:
            raise FrankenlensError(f"{as_option(name)} is of the images of --data; give --data as well.")
    for name, usual in (("fields", ()), ("encoding", None), ("cluster", IMAGE)):
        if getattr(config, name, usual) != usual and (data is None or is_public(str(data))):
            raise FrankenlensError(
                f"{as_option(name)} is of a file of your own: give that as --data, or leave {as_option(name)} out."
            )
    if getattr(config, "split", "all") != "all" and data is None:
        raise FrankenlensError(
            "--split is of data: give --data; synthetic questions are drawn anew by --seed."
        )
    copies = getattr(config, "copies", None)
    if copies is not None and not (getattr(config, "paper", False) or is_public(str(data))):
        raise FrankenlensError(
            "--copies holds public data sets: name one as --data (mathvista, math-500, gsm8k), or leave --copies out."
        )
    if copies is not None and not os.path.isdir(copies):
        raise FrankenlensError(f"--copies {copies} is no folder; give one that holds {', '.join(COPIES)}.")
    named = Fields.parse(getattr(config, "fields", ()))
    if named.cluster and getattr(config, "cluster", IMAGE) not in (IMAGE, named.cluster):
        raise FrankenlensError(
            f"--fields cluster={shown(named.cluster)} and --cluster {shown(config.cluster)} name two fields; give one."  # type: ignore[attr-defined]
        )


def checkpoints(config: ModelSettings) -> tuple[str, str, str | None]:
    """Base (None if it is not known), IN and RL, as (in, rl, base); the shipped triple where the settings name none."""
    if config.in_ is None or not config.rl:
        shipped = (str(embedded.path("in")), str(embedded.path("rl")))
        return *shipped, config.base or str(embedded.path("base"))
    return config.in_, config.rl if isinstance(config.rl, str) else config.rl[-1], config.base


def load_pair(config: PairSettings) -> Pair:
    """IN and RL; Base only where the settings name one."""
    return _opened(config, config.base)


def load_triple(config: PairSettings) -> Pair:
    """IN, RL and, where it is known, Base."""
    return _opened(config, checkpoints(config)[2])


def _opened(config: PairSettings, base: str | None) -> Pair:
    in_, rl, _ = checkpoints(config)
    names = ("dtype", "device_map", "one_resident")
    loading: dict[str, Any] = {name: getattr(config, name) for name in names}
    prompts = {**prompt_settings(config), "accept": config.accept}
    pair = Pair.from_pretrained(in_, rl, base, trace_format=config.trace_format, **prompts, **loading)
    for name, taken in pair.borrowed.items():
        print(
            f"{name.upper()}'s folder has no {taken.replace(' of ', '; taken: those of ', 1)}",
            file=sys.stderr,
        )
    return pair


def prompt_settings(config: PairSettings) -> dict[str, Any]:
    """What stands around every question, for `PromptBuilder`."""
    return {"template": _template(config), "system": config.system, "instruction": config.instruction}


def _template(config: PairSettings) -> str | None:
    if config.template is None:
        return None
    try:
        return config.template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FrankenlensError(f"--template {config.template} cannot be read: {one_line(error)}") from error


def load_examples(
    config: DataSettings,
    seed: int,
    tasks: Sequence[str] = REASONING,
    seen: Seen | None = None,
    legacy: bool = False,
) -> tuple[list[Example], dict[str, int]]:
    """At most `n` examples, and reason -> number of those that were left out.

    Without data: synthetic tasks in equal shares, from the split that training never saw. Of data: rows drawn by seed.

    Args:
        config: which questions.
        seed: of the draw.
        tasks: that are synthetic.
        seen: examples that are left out, in whose place other rows of data are drawn.
        legacy: draw rows of data as 2602.12395 does (`interp.questions.readers.draw.Draw`).

    Raises:
        FrankenlensError: no row can be read, a public data set cannot be loaded, or all were looked at before.
    """
    seen = seen or Seen()
    if config.data is None:
        sizes = [config.n // len(tasks) + (i < config.n % len(tasks)) for i in range(len(tasks))]
        drawn = (sample(task, size, seed, "map") for task, size in zip(tasks, sizes, strict=True))
        every = [example for some in drawn for example in some]
        examples = [example for example in every if example not in seen]
        dropped = {seen.reason: len(every) - len(examples)} if len(examples) < len(every) else {}
        _require_unseen(examples, dropped, seen)
        return examples, dropped
    examples, report = _read(str(config.data), config, Draw(config.n, seed, config.split, seen, legacy))
    if report.failures or report.notes:
        print(report, file=sys.stderr)
    examples, again = once_each(examples)
    dropped = {f"row {failure.row}: {failure.reason}": 1 for failure in report.failures[:LISTED]}
    dropped |= {"asked already, under another id": again} if again else {}
    if len(report.failures) > LISTED:
        dropped["further rows that cannot be read"] = len(report.failures) - LISTED
    _require_unseen(examples, report.passed, seen)
    if not examples:
        first = "".join(f"; row {one.row}: {one.reason}" for one in report.failures[:1])
        other = "".join(f"; {n} {reason}" for reason, n in report.passed.items())
        raise FrankenlensError(f"No row of {config.data} can be read{first}{other}.")
    return examples, {**dropped, **{f"rows {reason}": n for reason, n in report.passed.items()}}


def _require_unseen(examples: Sequence[Example], left_out: Mapping[str, int], seen: Seen) -> None:
    if examples or not left_out.get(seen.reason):
        return
    raise FrankenlensError(
        f"all {left_out[seen.reason]} questions were looked at {seen.when}, and what was found is confirmed on others: "
        "give another --seed or more of them (--n) of the synthetic ones; of data of your own, rows that it did not "
        "look at: make it on fewer (--n), or on one half (--split explore), and go on with the other (--split confirm)."
    )


def load_questions(config: QuestionSettings, seen: Seen | None = None) -> Questions:
    """`load_examples`, for a command that asks nothing else."""
    return Questions(*load_examples(config, config.seed, seen=seen))


def is_public(name: str) -> bool:
    """Whether `--data` names a public data set."""
    return name.partition(":")[0] == "mathvista" or name in ("math-500", "gsm8k")


def _read(name: str, config: DataSettings, draw: Draw) -> tuple[list[Example], ReadReport]:
    """The rows of a public data set, or of a file."""
    which, _, category = name.partition(":")
    if which == "mathvista":
        if category not in ("", *MATHVISTA):
            raise FrankenlensError(f"--data {name}: MathVista has {', '.join(MATHVISTA)}, no {category!r}.")
        return read_mathvista(**_copy(which, config), category=category or None, draw=draw, **config.access)
    if name in ("math-500", "gsm8k"):
        return {"math-500": read_math500, "gsm8k": read_gsm8k}[name](**_copy(name, config), draw=draw)
    named = Fields.parse(config.fields)
    if config.cluster != IMAGE:
        named = replace(named, cluster=config.cluster)
    return read_jsonl(name, config.images, named, encoding=config.encoding, draw=draw, **config.access)


def _copy(name: str, config: DataSettings) -> dict[str, Any]:
    """Where the local copy of a public data set is, if copies were given.

    Raises:
        Unreachable: copies were given, and this is not among them.
    """
    if config.copies is None:
        return {}
    kinds = ("", ".parquet", ".json", ".jsonl", ".arrow")
    found = next((path for kind in kinds if os.path.exists(path := config.copies / f"{name}{kind}")), None)
    if found is None:
        raise Unreachable(
            f"--copies {config.copies} holds no {name}: put {name}.parquet there, or what save_to_disk wrote as {name}."
        )
    return {"source": found}
