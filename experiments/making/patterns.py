"""Addresses in the terms of trainers that know none: names, a pattern, masks of rows, settings, PEFT's target_modules.

`frankenlens patterns` is the command; `interp.freezing.exports` does it. No weight is read.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import embedded
from experiments.bench import Bench, Planned, PlanSettings
from experiments.frame import Recipe
from hooks.errors import FrankenlensError
from hooks.processors import load_processor
from hooks.whereabouts import require_checkpoint
from interp.freezing.exports import FILES, FrozenNames, frozen_names
from interp.freezing.trainers import Setting
from interp.plan.structure import Weightless, weightless
from interp.plan.work import Work


@dataclass(frozen=True)
class PatternsConfig:
    """Settings of exported addresses.

    Attributes:
        addresses: what is to be frozen: blocks.0-9 vision blocks.17.attn.head.3 ...
        in_: the model that is trained, a folder (config.json will do) or a repository id; the shipped IN where none is
            given.
        out: folder for frozen.json (names, regex, parts, what each trainer can do of it, PEFT's target_modules),
            freeze_hook.py, which reads it in any trainer, and masks.safetensors where parts of tensors are frozen.
    """

    addresses: Annotated[tuple[str, ...], tyro.conf.Positional] = ("vision", "projector")
    in_: Annotated[str | None, tyro.conf.arg(name="in")] = None
    out: Path = Path("out/patterns")


def run(config: PatternsConfig) -> FrozenNames:
    """Look the addresses up, write the files, and say what each trainer takes.

    Raises:
        FrankenlensError: see `frozen_names`.
    """
    where = _where(config)
    require_checkpoint(where)
    try:
        processor = load_processor(where)
    except FrankenlensError:
        processor = None
    found = frozen_names(weightless(where).model, config.addresses, processor)
    found.save(config.out)
    print("\n".join(_told(found)))
    written = [name for name in FILES if found.parts or name != FILES[1]]
    print(f"{config.out}: {', '.join(written)}")
    return found


def _told(found: FrozenNames) -> Iterator[str]:
    named = f"{len(found.names)} parameters are frozen whole"
    yield f"{', '.join(found.addresses)}: {named}, and parts of {len(found.parts)}."
    for one in found.settings:
        yield f"{one.trainer}: {_given(one)}"
    adapters = found.target_modules or f"none: {found.no_targets}"
    yield f"PEFT, for adapters on these: target_modules {adapters}"


def _given(one: Setting) -> str:
    if not one.given:
        return f"no setting; {one.note}"
    dashed = all(name.startswith("--") for name in one.given)
    pairs = [
        f"{name} {shlex.quote(value)}".strip() if dashed and value else name if dashed else f"{name}={value}"
        for name, value in one.given.items()
    ]
    return f"{' '.join(pairs)} ({one.place}{'; ' if one.note else ''}{one.note})"


def _where(config: PatternsConfig) -> str:
    return str(embedded.path("in")) if config.in_ is None else config.in_


def structure(config: Any, settings: PlanSettings) -> Weightless:
    """Of the model."""
    return weightless(_where(config), "auto", settings.on)


def work(bench: Bench, config: Any) -> Iterator[Work]:
    """Names are looked up; nothing is computed, and no weight is read."""
    yield Work("names looked up", 0, 0, {}, 0, scales=False)


PLAN = Planned(work, asks=False, weights=lambda bench, config: {}, structure=structure)
COMMAND = Recipe(PatternsConfig, run, PLAN)
