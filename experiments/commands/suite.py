"""The paper's analyses of a pair on one page: metrics, localize, attention, compare, transfer.

`frankenlens suite` is the command; each part is a command of its own, and `freeze`, which trains, is none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from experiments.bench import Bench, Planned
from experiments.commands import attention, compare, localize, metrics, transfer
from experiments.frame import Command, steps
from experiments.on_ray import OF_CLUSTER
from experiments.options import Only, default
from experiments.planning import assumed_by, bench_of, works_of
from experiments.settings import IMAGE, ModelSettings, NoImages, PairSettings, load_triple, require_sound
from hooks.errors import FrankenlensError
from interp.pair.pair import Pair
from interp.plan.work import Work
from interp.questions.readers.draw import Split
from interp.questions.readers.hub import Unreachable
from interp.questions.readers.pictures import PIXELS
from interp.results.page import Section

Part = Literal["metrics", "localize", "attention", "compare", "transfer"]
PARTS: Mapping[str, Command[Any, Any, Any]] = {
    "metrics": metrics.COMMAND,
    "localize": localize.COMMAND,
    "attention": attention.COMMAND,
    "compare": compare.COMMAND,
    "transfer": transfer.COMMAND,
}
"""In the order of the page."""
OF_DATA = (
    "data",
    "images",
    "fields",
    "encoding",
    "split",
    "copies",
    "cluster",
    "images_anywhere",
    "max_pixels",
)
PAPERS_OWN = frozenset({"seed", "answer", "max_new_tokens", "system", "instruction"})
"""Of the models' settings, those that a paper may have in a part; a part gets them where they were given."""
QUARTER = 4  # of --n: localize's pairs a function


def _one_of(*parts: Part) -> Only:
    needs = f"{' or '.join(parts)} among --parts"
    return Only(needs, lambda config: any(part in config.parts for part in parts))


@dataclass(frozen=True)
class SuiteConfig(PairSettings):
    """Settings of the suite; each analysis has its own command for its own settings.

    It runs metrics, localize, attention, compare and transfer; `frankenlens freeze`, which trains, is not a part of it,
    and neither are the other commands.

    Attributes:
        data: JSONL (or a JSON array, CSV, parquet) of questions with answers and images, for all but localize;
            synthetic questions where not given.
        images: folder that relative image paths start from; by default that of the data.
        fields, encoding, split, copies, cluster, images_anywhere, max_pixels: as of `frankenlens map`.
        functions_data: folder of the paper's vision-function set, for localize.
        parts: of metrics, localize, attention, compare, transfer; on the page in this order. By default all for which
            there are images.
        n: questions of metrics, attention and transfer (shared out over synthetic tasks); of localize, pairs a
            function are a quarter of it. By default each analysis has its own.
        partition: of the decoder: paper, code, or sizes such as 8/12/8.
        paper: the paper's definitions, data and n in every part; a part whose data cannot be had is left out, and
            named.
        out: folder for all tables, figures and datasets, and report.html.
    """

    seed: int = default(0)
    answer: tuple[str, ...] = default(("answer",))
    max_new_tokens: int = default(128)
    system: str | None = default(None)
    instruction: str = default("")
    data: Path | None = default(None, only=_one_of("metrics", "attention", "transfer"))  # noqa: RUF009
    images: Path | None = None
    fields: tuple[str, ...] = ()
    encoding: str | None = None
    split: Split = "all"
    copies: Path | None = None
    cluster: str = IMAGE
    images_anywhere: bool = False
    max_pixels: int = PIXELS
    functions_data: Path | None = default(None, only=_one_of("localize"))  # noqa: RUF009
    parts: tuple[Part, ...] = default(tuple(PARTS))
    n: int | None = default(None, only=_one_of("metrics", "localize", "attention", "transfer"))
    partition: str = default("paper", only=_one_of("localize", "attention", "compare", "transfer"))
    paper: bool = False
    out: Path = Path("out/suite")


@dataclass(frozen=True)
class Prepared:
    """Every part, checked and loaded; what remains is to measure."""

    parts: Mapping[str, Callable[[Any], Iterable[Section]]]
    left_out: Mapping[str, int] = field(default_factory=dict)


def check(config: SuiteConfig) -> None:
    """Refuse no parts, too few questions for any, and a number of them beside the paper's."""
    if not config.parts:
        raise FrankenlensError(f"--parts is empty; choose of {', '.join(PARTS)}.")
    if config.n is not None and config.n < QUARTER:
        raise FrankenlensError(f"--n is {config.n}; give at least {QUARTER}.")
    if config.n is not None and config.paper:
        raise FrankenlensError("--paper has the paper's n in every part: leave out --n, or --paper.")


def load(config: SuiteConfig) -> Prepared:
    """Prepare every part, before a model is opened.

    Raises:
        FrankenlensError: settings of a part contradict each other, or its data cannot be read.
    """
    chosen = {part: command for part, command in PARTS.items() if part in config.parts}
    prepared: dict[str, Callable[[Any], Iterable[Section]]] = {}
    left_out: dict[str, int] = {}
    for part, own in chosen.items():
        try:
            prepared[part] = own.prepare(settings_of(config, part))
        except NoImages:
            if "parts" in config.given:
                raise
            left_out[f"{part}: no question has an image"] = 1
        except Unreachable as error:
            if "parts" in config.given:
                raise
            left_out[f"{part}: {error}"] = 1
    if not prepared:
        raise FrankenlensError(f"no part can be measured: {'; '.join(left_out)}")
    return Prepared(prepared, left_out)


def measure(pair: Pair, asked: Prepared, config: SuiteConfig) -> Iterator[Section]:
    """Every part on the same pair, one after the other; one that fails loses no other.

    Raises:
        FrankenlensError: at the end, where some parts failed.
    """
    failed: dict[str, Exception] = {}
    unseen: dict[str, int] = {}
    for part, own in steps(asked.parts.items(), "suite", "part"):
        try:
            sections = list(own(pair))
        except NoImages as error:
            if "parts" in config.given:
                failed[part] = error
            unseen[f"{part}: the models read text alone"] = 1
        except Exception as error:  # the finished parts are kept, and so is the reason
            failed[part] = error
        else:
            yield from (_without(section, unseen) for section in sections)
            unseen = unseen if not sections else {}
    if failed:
        told = "; ".join(f"{part}: {type(error).__name__}: {error}" for part, error in failed.items())
        kept = f"; {config.out} holds the others" if len(failed) < len(asked.parts) else ""
        raise FrankenlensError(
            f"{len(failed)} of {len(asked.parts)} parts failed{kept}. {told}"
        ) from failed.popitem()[1]


def _without(section: Section, left_out: Mapping[str, int]) -> Section:
    return replace(
        section, account=replace(section.account, left_out={**section.account.left_out, **left_out})
    )


Config = TypeVar("Config", bound=ModelSettings)


def settings_of(config: SuiteConfig, part: str) -> Any:
    """A part's settings: its own defaults; models, data, n, partition and paper mode of the suite, where given."""
    kind: type[ModelSettings] = PARTS[part].settings
    shared = {*PairSettings().options, *OF_DATA, "paper"} - PAPERS_OWN
    shared -= {*OF_CLUSTER}.difference(config.given)
    shared |= {*PAPERS_OWN, "n", "partition"} & config.given
    values = {one.name: getattr(config, one.name) for one in fields(kind) if one.name in shared}
    if part == "localize":
        values |= {
            "data": config.functions_data,
            "images": None,
            "fields": (),
            "encoding": None,
            "split": "all",
            "copies": None,
            "cluster": IMAGE,
        }
        values |= {"n": config.n // QUARTER} if config.n is not None else {}
    return kind(**values)


def work(bench: Bench, config: SuiteConfig) -> Iterator[Work]:
    """What the parts compute, one after the other."""
    for part, own in _benches(bench, config):
        for one in works_of(PARTS[part], own):
            yield replace(one, what=f"{part}: {one.what}")


def _benches(bench: Bench, config: SuiteConfig) -> Iterator[tuple[str, Bench]]:
    """What each part is planned with; those whose data cannot be had are left out, as they are when it is run."""
    for part in (part for part in PARTS if part in config.parts):
        own = settings_of(config, part)
        require_sound(own)
        PARTS[part].check(own)
        made = bench_of(PARTS[part], own, bench.settings)
        try:
            if bench.settings.tokens is None:
                _ = made.questions.loaded
        except (NoImages, Unreachable):
            if "parts" in config.given:
                raise
        else:
            yield part, made


def assumed(bench: Bench, config: SuiteConfig) -> Iterator[str]:
    """What the parts take for granted."""
    for part, own in _benches(bench, config):
        yield from (f"{part}: {one}" for one in assumed_by(PARTS[part], own))


COMMAND = Command(
    SuiteConfig,
    check,
    load,
    load_triple,
    measure,
    plan=Planned(work, base=True, assumed=assumed, asks=False),
)
