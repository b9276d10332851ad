"""A change that training made in a few components and nowhere else: a plant whose truth is an optimizer's."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.retraining.recipe import require_kept
from experiments.triple import checkpoints
from experiments.triple.clock import CpuClock
from experiments.triple.mixes import QUESTIONS, REASONING_SHARE
from experiments.triple.packing import Packer
from experiments.triple.rl import RL, require_grpo, train_rl
from experiments.triple.supervised import Schedule, traces, train, turns_loss
from hooks import HookedVLM
from interp.freezing import train_only

SUPERVISED = Schedule(80, batch=20, lr=2e-3, warmup=10)
REINFORCED = RL(steps=20, prompts=16, samples=8, lr=1e-3, save_every=20)


def train_components(
    in_folder: Path, components: Sequence[str], rl: bool, seed: int, folder: Path
) -> HookedVLM:
    """IN of the embedded triple, trained with everything frozen but some components.

    Args:
        in_folder: IN, of `frankenlens train-triple`.
        components: addresses that may change.
        rl: by GRPO with the exact-answer reward; otherwise supervised, with chains of thought of a teacher that
            overlooks nothing.
        seed: of the data.
        folder: holds the finished model, which is opened where it is there already, and what is unfinished.

    Raises:
        FrankenlensError: a frozen weight moved, or nothing did.
    """
    finished, unfinished = folder / "model", folder / "unfinished"
    if not finished.is_dir():
        if rl:
            require_grpo()
        unfinished.mkdir(parents=True, exist_ok=True)
        model, processor = checkpoints.load(in_folder)
        with train_only(model, components) as frozen:
            if rl:
                clock = CpuClock(unfinished / "cpu.json")
                train_rl(model, processor, REINFORCED, seed, unfinished, clock)
            else:
                vision: Any = model.config.vision_config
                loss = turns_loss(
                    Packer(processor.tokenizer, vision.patch_size),  # type: ignore[attr-defined]
                    traces(REASONING_SHARE, 0.0, SUPERVISED.batch, QUESTIONS),
                )
                train(model, loss, SUPERVISED, (seed, 5), unfinished / "plant.safetensors", "plant")
            require_kept(frozen, unfinished)
        checkpoints.save(model, finished)
        shutil.rmtree(unfinished)
    return HookedVLM.from_pretrained(finished, check=False)
