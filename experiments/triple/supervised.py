"""The supervised stages of the triple: align the vision tower, learn to see, start to think.

Every step draws its batch from its own seed, so a stage that resumes from a checkpoint repeats nothing and
skips nothing.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration

from experiments.triple.model import EMPTY
from experiments.triple.packing import IGNORED, Packer, Turn, describe, draw_turns, grids, patches
from interp.questions.tasks import CELLS, PERCEPTION, REASONING
from interp.questions.tasks.scenes import Scene, decode, render_batch, sample_scene

Rows = tuple[list[Scene], list[list[Turn]]]
DrawRows = Callable[[np.random.Generator], Rows]
Loss = Callable[[Qwen2_5_VLForConditionalGeneration, np.random.Generator], Float[Tensor, ""]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a supervised stage learns.

    Attributes:
        steps: optimiser steps.
        batch: images per step.
        lr: peak learning rate; linear warm-up over `warmup` steps, then a cosine down to `floor` of it.
        save_every: steps between checkpoints.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 50
    floor: float = 0.05
    save_every: int = 200

    def rate(self, step: int, spent: float = 0.0) -> float:
        """Learning rate of a step (0-based); `spent` is the fraction of another budget that is used up."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * max(done, spent))))


def align_loss(packer: Packer, batch: int) -> Loss:
    """Merged vision tokens should equal the sum of the word embeddings of colour, shape and cell.

    The squared error is in units of the embeddings' variance: 3 to begin with, 0 when exact.
    """

    def loss(model: Qwen2_5_VLForConditionalGeneration, rng: np.random.Generator) -> Float[Tensor, ""]:
        scenes = [sample_scene(rng, "train") for _ in range(batch)]
        pixels = patches(render_batch(scenes), packer.patch)
        seen = model.model.visual(pixels, grid_thw=grids(batch, packer.patch)).pooler_output
        words = model.get_parameter("model.language_model.embed_tokens.weight").detach()
        target = words[scene_words(packer, scenes)].sum(1)
        return (seen - target).pow(2).mean() / words.var()

    return loss


def scene_words(packer: Packer, scenes: list[Scene]) -> Int[Tensor, "cell 3"]:
    """Token ids that describe each cell: cell name and colour and shape, or twice `empty`."""
    rows = []
    for scene in scenes:
        for cell, code in zip(CELLS, scene.layout, strict=True):
            colour, shape = decode(code) if code else (EMPTY, EMPTY)
            rows.append(packer.encode(f"{cell} {colour} {shape}"))
    return torch.tensor(rows)


def turns_loss(packer: Packer, draw_rows: Callable[[np.random.Generator], Rows]) -> Loss:
    """Cross entropy per reply token over the rows that `draw_rows` gives."""

    def loss(model: Qwen2_5_VLForConditionalGeneration, rng: np.random.Generator) -> Float[Tensor, ""]:
        inputs = dict(packer.pack(*draw_rows(rng)))
        labels = inputs.pop("labels")[:, 1:]
        kept = labels != IGNORED
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][kept]
        return cross_entropy(model.lm_head(hidden), labels[kept])

    return loss


def fresh_rows(
    tasks: tuple[str, ...], batch: int, questions: int, chains: bool, descriptions: int = 0, facts: int = 8
) -> Callable[[np.random.Generator], Rows]:
    """Rows with new scenes of the training split every time, each with some descriptions and questions."""

    def draw_rows(rng: np.random.Generator) -> Rows:
        rows = [draw_turns(rng, tasks, questions, "train", chains) for _ in range(batch)]
        extra = [[describe(rng, scene, facts) for _ in range(descriptions)] for scene, _ in rows]
        return [scene for scene, _ in rows], [
            [*more, *turns] for more, (_, turns) in zip(extra, rows, strict=True)
        ]

    return draw_rows


def traces(share: float, misses: float, batch: int, questions: int) -> Callable[[np.random.Generator], Rows]:
    """Rows with the teacher's chains of thought on new scenes, `share` of them reasoning, the rest perception."""

    def draw_rows(rng: np.random.Generator) -> Rows:
        kinds = [REASONING if rng.random() < share else PERCEPTION for _ in range(batch)]
        rows = [draw_turns(rng, kind, questions, "train", True, misses) for kind in kinds]
        return [scene for scene, _ in rows], [turns for _, turns in rows]

    return draw_rows


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    loss: Loss,
    schedule: Schedule,
    seed: tuple[int, int],
    checkpoint: Path,
    label: str,
    spent: Callable[[], float] = lambda: 0.0,
) -> int:
    """Runs a stage with AdamW (clip 1.0), from `checkpoint` where that file exists.

    Args:
        model: trained in place.
        loss: called once per step.
        schedule: steps, batch size, learning rate.
        seed: (run, stage); each step adds its number.
        checkpoint: safetensors file with weights, optimiser moments and the step; removed by no one. One that is cut
            short is passed over with a line on standard error, and the stage starts afresh.
        label: shown on the progress bar.
        spent: fraction of a budget of time that is used up; 1 ends the stage before its steps are done.

    Returns:
        The number of steps done in all.
    """
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01)
    step = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    model.train()
    bar = tqdm(range(step, schedule.steps), initial=step, total=schedule.steps, desc=label, mininterval=10)
    recent: list[float] = []
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, min(1.0, spent()))
        value = loss(model, np.random.default_rng([*seed, step]))
        value.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], float(value.detach())]
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(recent):.3f}")
        stop = spent() >= 1
        if stop or (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            save_checkpoint(checkpoint, model, optimizer, step + 1)
        if stop:
            break
    model.eval()
    return step + 1


def save_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes weights and optimiser moments as one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores what `save_checkpoint` wrote; returns the step, 0 where the file is cut short."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        print(f"{path} is cut short ({error}); the stage starts afresh.", file=sys.stderr)
        return 0
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"weight/{name}"))
            state: dict[str, Any] = {
                key: file.get_tensor(f"{key}/{name}")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in names
            }
            if state:
                optimizer.state[parameter] = state
        return int(file.metadata()["step"])
