"""Makes the triple: Base, IN and RL, stage by stage, then measures it.

Every finished stage is a checkpoint folder in `out`, every unfinished one a file that training goes on from, so
an interrupted run is continued by starting it again. `frankenlens train-triple` is the command.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from experiments.bench import Planned
from experiments.frame import Recipe, require_begun_alike
from experiments.triple import checkpoints, evaluate
from experiments.triple.clock import CpuClock
from experiments.triple.mixes import mixes
from experiments.triple.model import ModelSize, build_model, build_tokenizer
from experiments.triple.packing import Packer
from experiments.triple.plan import assumed, structure, work
from experiments.triple.rl import RL, kept_steps, require_grpo, train_rl
from experiments.triple.supervised import (
    Schedule,
    align_loss,
    train,
    turns_loss,
)
from hooks.errors import FrankenlensError
from interp.results.lock import locked


@dataclass(frozen=True)
class TrainTriple:
    """Settings of the recipe; the defaults made the shipped triple.

    Attributes:
        out: folder for `base`, `in`, `rl-<seed>`, `control`, `results.json`, `table.md` and what is unfinished.
        keep_steps: checkpoints of each RL run that are kept beside it, in `rl-<seed>-steps/step-N`, evenly spaced, the
            last among them: a run for `frankenlens trajectory`.
        seeds: RL runs from the same IN, with seeds 0, 1, ...; `rl-0` is the one that ships.
        control: also go on with supervised training from IN, for the CPU time that `rl-0` took.
        seed: seed of initialisation and of the supervised data.
        size: architecture.
        align: vision tokens to word embeddings.
        perception: Base, with direct answers; the vision tower rests, as what no question needs yet is forgotten.
        cold_start: IN, with the teacher's chains of thought.
        misses: how often the teacher, reasoning, overlooks an object of what it counts (`experiments.triple.teacher`).
        control_schedule: the control, with more traces of the same teacher; ends with its steps or with the CPU time
            of `rl-0`, whichever is first.
        rl: GRPO.
        n: test questions per task.
        threads: CPU threads of torch.
    """

    out: Path
    seeds: int = 1
    control: bool = False
    seed: int = 0
    size: ModelSize = field(default_factory=ModelSize)
    align: Schedule = field(default_factory=lambda: Schedule(steps=400, batch=64, lr=2e-3))
    perception: Schedule = field(
        default_factory=lambda: Schedule(steps=1200, batch=20, lr=1e-3, save_every=100)
    )
    cold_start: Schedule = field(default_factory=lambda: Schedule(600, batch=20, lr=5e-4, warmup=20))
    misses: float = 0.5
    control_schedule: Schedule = field(default_factory=lambda: Schedule(2000, batch=20, lr=3e-4, warmup=10))
    rl: RL = field(default_factory=RL)
    n: int = 1000
    keep_steps: int = 0
    threads: int = 2


def run(config: TrainTriple) -> dict[str, Any]:
    """Trains what is not there yet and measures all of it; returns what `results.json` holds.

    Raises:
        FrankenlensError: if `seeds` is below 1, more steps are to be kept than there are or a run that is finished
            kept none, `out` holds a run with other settings, another run writes to it, or TRL
            is not installed.
    """
    if config.seeds < 1:
        raise FrankenlensError(f"seeds is {config.seeds}; at least one RL run is needed")
    if not 0 <= config.keep_steps <= config.rl.steps:
        raise FrankenlensError(
            f"keep_steps is {config.keep_steps}; RL has {config.rl.steps} steps, so give 0 to that"
        )
    require_grpo()
    torch.set_num_threads(config.threads)
    with locked(config.out):
        return _trained(config)


def _trained(config: TrainTriple) -> dict[str, Any]:
    require_begun_alike(config.out / "settings.json", _settings(config))
    folders = {"base": _stage(config, "base", _make_base), "in": _stage(config, "in", _make_in)}
    for seed in range(config.seeds):
        _require_steps(config, seed)
        folders[f"rl-{seed}"] = _stage(config, f"rl-{seed}", lambda *a, seed=seed: _make_rl(*a, seed=seed))
    if config.control:
        folders["control"] = _stage(config, "control", _make_control)
    results = evaluate.evaluate(folders, config.n, config.out / "measured")
    results["training"] = {"settings": _settings(config), "cpu_seconds": _cpu_seconds(config.out)}
    evaluate.write_json(results, config.out / "results.json")
    (config.out / "table.md").write_text(evaluate.table(results), encoding="utf-8")
    return results


Model = Qwen2_5_VLForConditionalGeneration
Make = Callable[[TrainTriple, Path, CpuClock], Model]


def _stage(config: TrainTriple, name: str, make: Make) -> Path:
    """The folder of a stage, made first if it is not there."""
    folder, unfinished = config.out / name, config.out / "unfinished" / name
    if not folder.exists():
        unfinished.mkdir(parents=True, exist_ok=True)
        clock = CpuClock(unfinished / "cpu.json")
        checkpoints.save(make(config, unfinished, clock), folder)
        clock.write()
    return folder


def _make_base(config: TrainTriple, folder: Path, clock: CpuClock) -> Model:
    tokenizer = build_tokenizer()
    model, packer = build_model(tokenizer, config.size, config.seed), Packer(tokenizer, config.size.patch)
    seen = align_loss(packer, config.align.batch)
    train(model, seen, config.align, (config.seed, 1), folder / "align.safetensors", "align", clock.tick)
    rows = mixes(config)[0]
    file = folder / "perception.safetensors"
    asked = turns_loss(packer, rows)
    model.model.visual.requires_grad_(False)
    train(model, asked, config.perception, (config.seed, 2), file, "perception", clock.tick)
    model.model.visual.requires_grad_(True)
    return model


def _make_in(config: TrainTriple, folder: Path, clock: CpuClock) -> Model:
    model, processor = checkpoints.load(config.out / "base")
    packer = Packer(processor.tokenizer, config.size.patch)  # type: ignore[attr-defined]
    rows = mixes(config)[1]
    file = folder / "cold_start.safetensors"
    train(
        model, turns_loss(packer, rows), config.cold_start, (config.seed, 3), file, "cold start", clock.tick
    )
    return model


def _make_rl(config: TrainTriple, folder: Path, clock: CpuClock, *, seed: int) -> Model:
    model, processor = checkpoints.load(config.out / "in")
    keep = (steps_folder(config, seed), kept_steps(config.rl.steps, config.keep_steps))
    log = train_rl(model, processor, config.rl, seed, folder, clock, keep=keep)
    evaluate.write_json(log, folder / "log.json")
    return model


def steps_folder(config: TrainTriple, seed: int) -> Path:
    """Where the steps of an RL run are kept."""
    return config.out / f"rl-{seed}-steps"


def _require_steps(config: TrainTriple, seed: int) -> None:
    """Refuse to keep steps of a run that is over."""
    wanted = [f"step-{n}" for n in kept_steps(config.rl.steps, config.keep_steps)]
    folder, there = config.out / f"rl-{seed}", steps_folder(config, seed)
    missing = [name for name in wanted if not (there / name).exists()]
    if folder.exists() and missing:
        raise FrankenlensError(
            f"{folder} is finished, and {there} lacks {', '.join(missing)}: to keep these, delete {folder} and "
            f"{config.out / 'unfinished' / folder.name}, and train it again."
        )


def _make_control(config: TrainTriple, folder: Path, clock: CpuClock) -> Model:
    """IN, trained on with the teacher's chains to new questions of RL's mix, until rl-0's CPU time is spent."""
    model, processor = checkpoints.load(config.out / "in")
    packer = Packer(processor.tokenizer, config.size.patch)  # type: ignore[attr-defined]
    spent = json.loads((config.out / "unfinished" / "rl-0" / "cpu.json").read_text())
    clock.limit = spent["cpu_seconds"]
    schedule = config.control_schedule
    taught = turns_loss(packer, mixes(config)[2])
    train(model, taught, schedule, (config.seed, 4), folder / "control.safetensors", "control", clock.tick)
    return model


_NOT_OF_WEIGHTS = ("out", "seeds", "control", "n", "threads", "keep_steps")


def _settings(config: TrainTriple) -> dict[str, Any]:
    """What decides the weights: everything but where, how many and how fast."""
    settings = asdict(config)
    return {k: v for k, v in settings.items() if k not in _NOT_OF_WEIGHTS}


def _cpu_seconds(out: Path) -> dict[str, float]:
    files = sorted((out / "unfinished").glob("*/cpu.json"))
    return {file.parent.name: json.loads(file.read_text())["cpu_seconds"] for file in files}


PLAN = Planned(work, assumed=assumed, asks=False, weights=lambda bench, config: {}, structure=structure)
COMMAND = Recipe(TrainTriple, run, PLAN)
