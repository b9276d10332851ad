"""The RL stage of the triple: GRPO by TRL, rewarded for the exact answer and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from transformers import PreTrainedModel, TrainerCallback
from transformers.processing_utils import ProcessorMixin

from experiments.triple.checkpoints import save
from experiments.triple.clock import CpuClock
from experiments.triple.replies import MAX_REPLY, read, suppressed
from experiments.triple.resuming import train_from_last
from hooks.extras import require_installed
from interp.questions.tasks import REASONING, TASKS, Task, render
from interp.questions.tasks.sampling import draw
from interp.questions.tasks.scenes import Scene

if TYPE_CHECKING:
    from datasets import Dataset

PERCEPTION_MIX = ("colour_at", "shape_at", "count", "count", "exists")
"""Perception tasks among the prompts; counting, the first to suffer, comes twice."""


def require_grpo() -> None:
    """Refuse to train by RL, before anything else is done for it, where the packages for it are missing.

    Raises:
        MissingPackage: names them, and the extra that brings them.
    """
    require_installed("training by GRPO", "trl", "datasets", "accelerate")


@dataclass(frozen=True)
class RL:
    """Settings of the RL stage.

    Attributes:
        steps: optimiser steps.
        prompts: different prompts per step.
        samples: completions per prompt, the group over which the reward is normalised.
        lr: peak learning rate; a short warm-up, then a line down to 0.
        perception: share of prompts drawn from the perception tasks, which keeps what Base learnt.
        beta: weight of the KL to IN; above 0 costs a reference forward per step.
        save_every: steps between checkpoints.
    """

    steps: int = 150
    prompts: int = 32
    samples: int = 16
    lr: float = 1e-4
    perception: float = 0.3
    beta: float = 0.0
    save_every: int = 25


def exact_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the reply has the declared form and its answer is the reference, else 0."""
    return [
        float(read(completion[0]["content"]).answer == expected)
        for completion, expected in zip(completions, answer, strict=True)
    ]


def build_prompts(settings: RL, seed: int) -> Dataset:
    """The prompts of a whole run in order: columns prompt, image, answer, task; training scenes only."""
    require_grpo()
    from datasets import Dataset

    rows = []
    for task, scene, arguments in drawn(settings, seed):
        rows.append(
            {
                "prompt": [{"role": "user", "content": task.question(arguments)}],
                "image": render(scene),
                "answer": task.solve(arguments, scene).answer,
                "task": task.name,
            }
        )
    return Dataset.from_list(rows)


def drawn(settings: RL, seed: int) -> Iterator[tuple[Task, Scene, Any]]:
    """Task, scene and what is asked about it, of every prompt of a run in order."""
    rng = np.random.default_rng([seed, 3])
    for _ in range(settings.steps * settings.prompts):
        names = PERCEPTION_MIX if rng.random() < settings.perception else REASONING
        task = TASKS[names[int(rng.integers(len(names)))]]
        yield task, *draw(task.name, rng, "train")


def build_trainer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: RL,
    seed: int,
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
    trl: Mapping[str, Any] | None = None,
):
    """A `GRPOTrainer` on the CPU, ready to train the model in place; `trl` overrides arguments of `GRPOConfig`."""
    require_grpo()
    from trl import GRPOConfig  # heavy, and only needed here

    from experiments.triple.shared_prefix import SharedPrefixGRPOTrainer

    arguments = dict(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        bf16=False,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * settings.samples,
        num_generations=settings.samples,
        max_completion_length=MAX_REPLY,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=5,
        max_grad_norm=1.0,
        beta=settings.beta,
        scale_rewards="none",
        temperature=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        generation_kwargs={"suppress_tokens": suppressed(processor)},
        logging_steps=5,
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to=[],
        dataloader_pin_memory=False,
    )
    return SharedPrefixGRPOTrainer(
        model=model,
        reward_funcs=cast(Any, exact_answer),
        args=GRPOConfig(**{**arguments, **(trl or {})}),
        train_dataset=build_prompts(settings, seed),
        processing_class=processor,
        callbacks=callbacks,
    )


class _Tick(TrainerCallback):
    """Lets a clock run along."""

    def __init__(self, clock: CpuClock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.tick()


class _Keep(TrainerCallback):
    """Keeps the model after some of the steps, each as a folder `step-N`; what is there already stays."""

    def __init__(self, folder: Path, numbers: Sequence[int]) -> None:
        self.folder, self.numbers = folder, frozenset(numbers)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        place = self.folder / f"step-{state.global_step}"
        if state.global_step not in self.numbers or place.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        model = given["model"]
        cached = model.config.use_cache
        save(model, place)
        model.config.use_cache = cached  # the trainer's own


def kept_steps(steps: int, n: int) -> list[int]:
    """`n` of so many steps, evenly spaced, the last among them."""
    return sorted({round(steps * i / n) for i in range(1, n + 1)} - {0}) if n else []


def train_rl(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: RL,
    seed: int,
    folder: Path,
    clock: CpuClock,
    trl: Mapping[str, Any] | None = None,
    keep: tuple[Path, Sequence[int]] | None = None,
) -> list[dict[str, float]]:
    """Trains the model in place, from the last checkpoint in `folder` where there is one; `trl` as in `build_trainer`.

    Args:
        keep: a folder, and the numbers of the steps after which the model is kept there.

    Returns:
        TRL's log: one row per five steps.
    """
    callbacks = [_Tick(clock), *([] if keep is None else [_Keep(*keep)])]
    trainer = build_trainer(model, processor, settings, seed, folder, callbacks, trl)
    train_from_last(trainer, folder)
    model.eval()
    return trainer.state.log_history
