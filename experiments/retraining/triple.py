"""RL once more from the embedded IN, by the recipe that made the embedded RL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from experiments.retraining.recipe import Outcome, frozen_or_not, require_kept
from experiments.triple import checkpoints, evaluate
from experiments.triple.clock import CpuClock
from experiments.triple.rl import RL, train_rl
from hooks import FrankenlensError, HookedVLM
from hooks.stored.settings import require_sound_settings


@dataclass(frozen=True)
class TripleRecipe:
    """The recipe that made the embedded RL, on the embedded IN (or another that `frankenlens train-triple` made)."""

    in_folder: Path
    rl: RL
    n: int
    trl: Mapping[str, Any]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def definition(self) -> str:
        """In words."""
        rl = self.rl
        return (
            f"GRPO of the embedded triple from IN: {rl.steps} steps of {rl.prompts} prompts x {rl.samples} samples, "
            f"peak learning rate {rl.lr:g}, reward = exact answer; greedy accuracy on scenes that no training saw"
        )

    @property
    def tasks(self) -> list[str]:
        """The task of every question."""
        return [task for task in evaluate.TASK_NAMES for _ in range(self.n)]

    @property
    def clusters(self) -> None:
        """See `Recipe`: every scene has one question."""
        return None

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Reasoning, which RL is for, and perception."""
        return {name: evaluate.GROUPS[name] for name in ("reasoning", "perception")}

    def train(self, addresses: Sequence[str], seed: int, unfinished: Path, folder: Path) -> None:
        """See `Recipe`."""
        model, processor = checkpoints.load(self.in_folder)
        with frozen_or_not(model, addresses) as frozen:
            clock = CpuClock(unfinished / "cpu.json")
            log = train_rl(model, processor, self.rl, seed, unfinished, clock, self.trl)
            clock.write()
            evaluate.write_json(log, unfinished / "log.json")
            require_kept(frozen, unfinished)
        checkpoints.save(model, folder)

    def measure(self, checkpoint: Path | HookedVLM, kept: Path) -> Outcome:
        """See `Recipe`."""
        if isinstance(checkpoint, HookedVLM):
            checkpoint = Path(str(checkpoint.model.name_or_path))
        score, hits = evaluate.measure(checkpoint, self.n, kept=kept)
        return Outcome(hits.astype(float).ravel(), score.unreadable)


def require_triple(path: str) -> Path:
    """The folder of an IN that the recipe of the triple can train.

    Raises:
        FrankenlensError: it is another model's.
    """
    folder = Path(path)
    fits = os.path.isfile(folder / "config.json")
    if fits:
        require_sound_settings(folder)
    fits = fits and AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type == "qwen2_5_vl"
    if fits:
        vocabulary = checkpoints.build_tokenizer().get_vocab()
        fits = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab() == vocabulary
    if not fits:
        raise FrankenlensError(
            f"{path} is not an IN of `frankenlens train-triple`, and only such a model can be trained on the synthetic "
            "scenes: give your own questions, --train to train on and --data to measure on."
        )
    return folder
