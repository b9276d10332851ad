"""An adapter merged into the checkpoint that it was trained on, as a folder that transformers opens.

`frankenlens merge IN ADAPTER --out DIR` is the command; `interp.transfer.adapted` does it. Recipes that merge several
models (TIES, SLERP, ...) are `interp.transfer.merging`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.bench import Bench, Planned, PlanSettings
from experiments.frame import Recipe
from hooks.stored.settings import settings_of
from hooks.whereabouts import require_folder
from interp.plan.adapters import merging
from interp.plan.structure import Weightless, weightless
from interp.plan.work import Work
from interp.transfer.adapted import AdaptedReport, save_adapted


@dataclass(frozen=True)
class MergeConfig:
    """Settings of a merge.

    Attributes:
        in_: folder of the model that the adapter was trained on.
        adapter: folder of a LoRA adapter (adapter_config.json, adapter_model.safetensors).
        out: folder for the merged checkpoint, with IN's files, names, types, tokenizer and processor, and merge.json;
            it must be empty or not there.
        dtype: float32 stores all weights in it; auto keeps each tensor's own type, and what that type does not hold of
            the update is measured, and refused above 5 %.
        accept: rounding takes such a loss.
        proof: compare the logits of what was written with those of IN under PEFT's own adapter, on a prompt, in
            float32; each is opened for it, one after the other.
    """

    in_: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    out: Path
    dtype: Literal["auto", "float32"] = "auto"
    accept: tuple[str, ...] = ()
    proof: bool = True


def run(config: MergeConfig) -> AdaptedReport:
    """Merge, and say what was written.

    Raises:
        FrankenlensError: see `save_adapted`.
    """
    require_folder(config.adapter, "the folder of a PEFT adapter, with adapter_config.json in it")
    made = save_adapted(
        config.in_,
        config.adapter,
        config.out,
        dtype=None if config.dtype == "auto" else config.dtype,
        accept=config.accept,
        prove=config.proof,
    )
    told = f"{made.changed} tensors changed; {made.lost:.2%} of the update's norm lost to rounding"
    if made.off is not None:
        told += (
            f"; logits on a prompt off by {made.off:.2g}, where the adapter moves them by {made.moved:.2g}"
        )
    print(f"{made.folder}: {told}.")
    return made


def structure(config: Any, settings: PlanSettings) -> Weightless:
    """Of IN."""
    return weightless(config.in_, "auto", settings.on)


def work(bench: Bench, config: Any) -> Iterator[Work]:
    """What `run` computes, reads and writes, from the two configurations."""
    yield from merging(bench.vlm.model, settings_of(config.adapter / "adapter_config.json"), config.proof)


def assumed(bench: Bench, config: Any) -> Iterator[str]:
    """What `work` takes for granted."""
    yield "main memory is what is planned; an adapter without modules_to_save"
    if config.proof:
        yield "the proof's three forward passes of a few words are not counted"


PLAN = Planned(work, assumed=assumed, asks=False, weights=lambda bench, config: {}, structure=structure)
COMMAND = Recipe(MergeConfig, run, PLAN)
