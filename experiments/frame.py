"""The frame that every command stands in: check, load, open, measure, publish, close.

A command's file holds its settings, its question and its sections, put together in a `Command`. Everything that can be
refused without a model is refused before one is opened; what was finished is published even where a later section
fails; nothing unfinished is left in `out` as a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from tqdm.auto import tqdm

from experiments.contract import admitted
from experiments.given import TraceSettings, fingerprints, require_trace_files, told_of
from experiments.on_ray import OF_CLUSTER, cluster_for, require_on_ray
from experiments.settings import ModelSettings, PairSettings, require_sound, require_there
from hooks.errors import FrankenlensError
from hooks.memory import memory_limit
from interp.pair.pair import Pair
from interp.questions.examples import Example, cluster_of, fingerprint
from interp.results.files import provenance, publishing, settle
from interp.results.lock import is_locked, locked, making
from interp.results.page import Section, save_sections
from interp.results.store import Store, are_elsewhere, opened
from interp.results.whole import write_whole

Item = TypeVar("Item")


class Planned(Protocol):
    """What a command is planned by; `experiments.bench` has the one there is."""

    @property
    def works(self) -> Callable[[Any, Any], Iterable[Any]]:
        """From what is planned with, and the settings, to the steps."""
        ...

    @property
    def base(self) -> bool:
        """Whether Base is opened too."""
        ...


@runtime_checkable
class Opened(Protocol):
    """What is measured: a `Pair`, or whatever else a command opens."""

    def provenance(self) -> Mapping[str, Any]:
        """Where it comes from; asked for after measuring."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@runtime_checkable
class Asked(Protocol):
    """What it is asked: `experiments.settings.Questions`, or whatever else a command loads."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """Reason to number of what could not be loaded."""
        ...


Settings = TypeVar("Settings", bound=ModelSettings)
Models = TypeVar("Models", bound=Opened)
Question = TypeVar("Question", bound=Asked)


@dataclass(frozen=True)
class Command(Generic[Settings, Models, Question]):
    """One question, from settings to a page.

    Attributes:
        settings: its settings, a dataclass.
        check: refuses settings that contradict each other, beyond what `require_sound` refuses.
        load: what is asked, before that is opened which it is asked of.
        open: what it is asked of.
        measure: the sections of the page, one after the other, as they are finished. What `load` and `admit` left out
            is added to their accounts.
        admit: what of that can be asked of what was opened, and read; refuses a pair whose traces cannot be read.
        plan: the work that it is (`experiments.bench.Planned`); None where no honest count of it exists yet.
        on_ray: whether several processes can share its parts (`hooks.shared`), as `--ray` lets them.
    """

    settings: type[Settings]
    check: Callable[[Settings], None]
    load: Callable[[Settings], Question]
    open: Callable[[Settings], Models]
    measure: Callable[[Models, Question, Settings], Iterable[Section]]
    admit: Callable[[Models, Question, Settings], Question] = admitted
    plan: Planned | None = None
    on_ray: bool = False

    def prepare(self, config: Settings) -> Callable[[Models], Iterator[Section]]:
        """Check and load; what remains is to measure, whatever is opened.

        Raises:
            FrankenlensError: settings contradict each other, or what is asked cannot be loaded.
        """
        asked = self._asked(config)
        return lambda models: self.sections(models, asked, config)

    def sections(self, models: Models, asked: Question, config: Settings) -> Iterator[Section]:
        """What is measured of what was opened, section by section."""
        fit = self.admit(models, asked, config)
        for section in self.measure(models, fit, config):
            whole = clustered(_without(section, fit.left_out), getattr(fit, "examples", ()))
            given = getattr(fit, "traces", None)
            yield told_of(whole, given) if given else whole

    def run(self, config: Settings) -> list[Section]:
        """Measure, and write tables, figures, datasets and the page to `config.out`, all or none.

        Returns:
            The sections of the page; none in processes other than the first, where there are several.

        Raises:
            FrankenlensError: see `prepare`; another run writes to `config.out`; what is opened is not what the command
                needs, or nothing can be measured of it; the disk is full.
        """
        asked = self._asked(config)
        if not is_first_process():
            return []
        with locked(config.out), memory_limit(getattr(config, "max_memory", None)):
            settle(config.out)
            if (cluster := cluster_for(config)) is not None:
                there = replace(config, out=config.out.absolute())
                found = cluster.run(partial(self.open, there), partial(finish, self, asked, there))
            else:
                with closing(self.open(config)) as models:
                    found = finish(self, asked, config, models)
            if found.sections:
                _publish(found.sections, config, found.models)
        if found.failure is not None:
            raise found.failure
        return found.sections

    def _asked(self, config: Settings) -> Question:
        require_sound(config)
        require_on_ray(config, self.on_ray)
        self.check(config)
        require_there(config)
        if isinstance(config, TraceSettings):
            require_trace_files(config)
        _require_writable(config.out)
        return self.load(config)


@dataclass(frozen=True)
class Finished:
    """What a command measured.

    Attributes:
        sections: that were finished.
        models: their provenance; none where nothing was finished.
        failure: of the section after them.
    """

    sections: list[Section]
    models: Mapping[str, Any]
    failure: Exception | None


def finish(
    command: Command[Settings, Models, Question], asked: Question, config: Settings, models: Models
) -> Finished:
    """Every section that can be finished."""
    sections: list[Section] = []
    failure: Exception | None = None
    try:
        for section in command.sections(models, asked, config):
            sections.append(section)
    except Exception as error:  # what is finished is published nevertheless
        failure = error
    return Finished(sections, models.provenance() if sections else {}, failure)


@dataclass(frozen=True)
class Recipe(Generic[Item]):
    """A command that asks nothing of a pair, but makes one.

    Attributes:
        settings: its settings, a dataclass.
        run: makes it.
        plan: as a `Command`'s.
    """

    settings: type[Item]
    run: Callable[[Item], Any]
    plan: Planned | None = None


def is_first_process() -> bool:
    """Of those that `accelerate launch` or torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def steps(work: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """The work, under a bar on standard error; `total` where its length does not say how much there is."""
    return tqdm(work, desc=what, unit=unit, total=total, delay=1)


def finished(out: Path, **about: Any) -> Path:
    """The folder for parts that are finished before the whole is, named after everything that they depend on.

    The same command takes it up; with other settings, models or questions it begins anew.
    """
    text = json.dumps({"version": version("frankenlens"), **about}, sort_keys=True, default=str)
    return out / "finished" / hashlib.sha256(text.encode()).hexdigest()[:12]


OF_PLACE = (
    "out",
    "in_",
    "rl",
    "base",
    "data",
    "images",
    "template",
    "map",
    "max_memory",
    "traces",
    *OF_CLUSTER,
    "one_resident",
)
"""Settings that say where something is, or how much of it: the parts depend on what is there."""


def kept(pair: Pair, examples: Iterable[Example], config: PairSettings, **also: Any) -> Store | None:
    """The store for what is finished of a command before the whole is; the same command takes it up.

    None where nobody holds the lock of `config.out`: what is measured from Python is not kept by itself.

    Args:
        pair: the models.
        examples: what is asked.
        config: the settings.
        also: what the numbers depend on besides.
    """
    if not is_locked(config.out) and not are_elsewhere():
        return None
    about = {
        "command": type(config).__name__,
        "models": pair.provenance(),
        "settings": {name: value for name, value in config.options.items() if name not in OF_PLACE},
        "prompts": [pair.builder.template, pair.builder.system, pair.builder.instruction],
        "questions": [
            (example.id, example.task, fingerprint(example), _of_meta(example)) for example in examples
        ],
        **also,
    }
    if isinstance(config, TraceSettings) and config.traces:
        about["traces"] = fingerprints(config)
    return opened(finished(config.out, **about), {"version": version("frankenlens"), **about})


def _of_meta(example: Example) -> str:
    """What else is known of an example: a description may stand in its prompt."""
    text = json.dumps(example.meta, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


def require_begun_alike(file: Path, settings: Mapping[str, Any]) -> None:
    """Write down with which settings a run begins, or refuse to go on with one that was begun with others.

    Raises:
        FrankenlensError: names the settings that differ.
    """
    wanted = json.loads(json.dumps(settings))
    if os.path.exists(file):
        begun = _begun(file)
        other = sorted(name for name in wanted if begun.get(name) != wanted[name])
        if other:
            raise FrankenlensError(
                f"{file} holds a run with other settings ({', '.join(other)}); choose another --out, or delete it."
            )
    with making(file.parent):
        write_whole(file, json.dumps(wanted, indent=1).encode())


def _begun(file: Path) -> Mapping[str, Any]:
    try:
        begun = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise FrankenlensError(f"{file} is damaged ({error}); delete it, or choose another --out.") from error
    if not isinstance(begun, dict):
        raise FrankenlensError(f"{file} is damaged; delete it, or choose another --out.")
    return begun


def _require_writable(out: Path) -> None:
    """Told before the work is done, not after it; `out` itself is made when there is something to write."""
    place = next(folder for folder in (out, *out.absolute().parents) if os.path.exists(folder))
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        raise FrankenlensError(
            f"Cannot write to {out}: {place} is no folder that you may write to. Choose another --out."
        )


def _without(section: Section, left_out: Mapping[str, int]) -> Section:
    """The section with what was left out before it was measured in its account."""
    every = Counter(left_out)
    every.update(section.account.left_out)
    return replace(section, account=replace(section.account, left_out=dict(every)))


def clustered(section: Section, examples: Sequence[Example]) -> Section:
    """The section with how many of its examples are independent in its account, where not all are."""
    clusters = len({cluster_of(example) for example in examples})
    if clusters == len(examples):
        return section
    told = (
        f"{section.account.n}; {len(examples)} questions in {clusters} clusters, and what is in one cluster "
    )
    told += "counts as one in intervals and tests"
    return replace(section, account=replace(section.account, n=told))


def _publish(sections: Sequence[Section], config: ModelSettings, models: Mapping[str, Any]) -> None:
    """Write all files of the sections and one page, all or none, and say what was found."""

    def joined(name: str) -> dict[str, int]:
        several = len(sections) > 1
        return {
            f"{section.name}: {key}" if several else key: number
            for section in sections
            for key, number in getattr(section.account, name).items()
        }

    settings = {name: value for name, value in config.options.items() if name not in OF_CLUSTER}
    made = provenance(models, settings, joined("counts"), joined("left_out"))
    with publishing(config.out) as staging:
        save_sections(sections, staging, made)
        written = sorted(path.name for path in staging.iterdir())
    for section in sections:
        several_lines = "\n" in section.finding
        print(f"{section.title}:", section.finding, sep="\n" if several_lines else " ")
        if section.details:
            print(section.details)
    print(f"{config.out}: {', '.join(written)}")
