"""All analyses of a pair on one page: metrics, localization, attention, weights, transfer (and freezing, if asked)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm.auto import tqdm

from experiments.commands import attention, compare, localize, metrics, transfer
from experiments.settings import PairSettings, load_examples, load_pair, publish, require_sound
from hooks.errors import FrankenlensError
from interp.pair.pair import Pair
from interp.questions.tasks import PERCEPTION, REASONING
from interp.results.page import Section

Part = Literal["metrics", "localize", "attention", "compare", "transfer"]
PARTS: tuple[Part, ...] = ("metrics", "localize", "attention", "compare", "transfer")
Config = TypeVar("Config", bound=PairSettings)


@dataclass(frozen=True)
class SuiteConfig(PairSettings):
    """Settings of the suite; each analysis has its own command for its own settings.

    `frankenlens freeze`, which trains, is not a part of it.

    Attributes:
        data: JSONL of questions with answers and images, for all but localize; synthetic questions where not given.
        images: folder that relative image paths start from; by default that of the data.
        functions_data: folder of the paper's vision-function set, for localize.
        parts: of metrics, localize, attention, compare, transfer; on the page in this order.
        n: questions of metrics, attention and transfer (shared out over synthetic tasks); of localize, pairs a
            function are a quarter of it. By default each analysis has its own.
        partition: of the decoder: paper, code, or sizes such as 8/12/8.
        paper: the paper's definitions and n in every part.
        out: folder for all tables, figures and datasets, and report.html.
    """

    data: Path | None = None
    images: Path | None = None
    functions_data: Path | None = None
    parts: tuple[Part, ...] = PARTS
    n: int | None = None
    partition: str = "paper"
    paper: bool = False
    out: Path = Path("out/suite")


def run(config: SuiteConfig) -> list[Section]:
    """Run the parts on one opened pair and write everything, all or none.

    Raises:
        FrankenlensError: settings contradict each other, or the models or data cannot be read, before anything runs;
            or some parts failed, after the others are written.
    """
    require_sound(config)
    if not config.parts:
        raise FrankenlensError(f"--parts is empty; choose of {', '.join(PARTS)}.")
    if config.n is not None and config.n < 4:
        raise FrankenlensError(f"--n is {config.n}; give at least 4.")
    prepared = {part: _PREPARE[part](config) for part in PARTS if part in config.parts}
    pair = load_pair(config, with_base=True)
    try:
        models, sections, failed = pair.provenance(), [], {}
        for part, measure in tqdm(prepared.items(), desc="suite", unit="part"):
            try:
                sections.append(measure(pair))
            except Exception as error:  # the finished parts are kept, and so is the reason
                failed[part] = error
        if sections:
            publish(sections, config, config.out, models, {"parts": len(sections)})
    finally:
        pair.close()
    if failed:
        told = "; ".join(f"{part}: {type(error).__name__}: {error}" for part, error in failed.items())
        kept = f"; {config.out} holds the others" if sections else ""
        raise FrankenlensError(
            f"{len(failed)} of {len(prepared)} parts failed{kept}. {told}"
        ) from failed.popitem()[1]
    return sections


def settings_of(config: SuiteConfig, kind: type[Config], **given: Any) -> Config:
    """A part's settings: its own defaults; models, data, partition and paper mode of the suite; what is given."""
    own = {field.name for field in fields(kind)}
    shared = own & {*(field.name for field in fields(PairSettings)), "data", "images", "partition", "paper"}
    return kind(**{**{name: getattr(config, name) for name in shared}, **given})


def _sized(config: SuiteConfig, share: int = 1) -> Mapping[str, Any]:
    return {} if config.n is None else {"n": max(1, config.n // share)}


def _metrics(config: SuiteConfig) -> Callable[[Pair], Section]:
    own = settings_of(config, metrics.MetricsConfig, **_sized(config))
    metrics.check(own)
    examples, dropped = metrics.load(own)
    return lambda pair: metrics.measure(pair, examples, own, dropped)


def _localize(config: SuiteConfig) -> Callable[[Pair], Section]:
    data = {"data": config.functions_data, "images": None}
    own = localize.settled(settings_of(config, localize.LocalizeConfig, **data, **_sized(config, 4)))
    localize.check(own)
    asked = localize.load(own)
    return lambda pair: localize.measure(pair, asked, own)


def _attention(config: SuiteConfig) -> Callable[[Pair], Section]:
    own = attention.settled(settings_of(config, attention.AttentionConfig, **_sized(config)))
    attention.check(own)
    examples, dropped = load_examples(own, own.seed)
    return lambda pair: attention.measure(pair, examples, own, dropped)


def _compare(config: SuiteConfig) -> Callable[[Pair], Section]:
    own = settings_of(config, compare.CompareConfig)
    compare.check(own)
    opened = compare.open_checkpoints(own)
    return lambda pair: compare.measure(opened, own)


def _transfer(config: SuiteConfig) -> Callable[[Pair], Section]:
    own = transfer.settled(settings_of(config, transfer.TransferConfig, **_sized(config)))
    transfer.check(own)
    examples, dropped = load_examples(own, own.seed, (*PERCEPTION, *REASONING))
    return lambda pair: transfer.measure(pair, examples, own, dropped)


_PREPARE: Mapping[Part, Callable[[SuiteConfig], Callable[[Pair], Section]]] = {
    "metrics": _metrics,
    "localize": _localize,
    "attention": _attention,
    "compare": _compare,
    "transfer": _transfer,
}
