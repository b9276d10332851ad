"""What making the triple takes, counted from its settings and not run: its own rows are drawn, and nothing learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from experiments.bench import Bench, PlanSettings
from experiments.triple.evaluate import TASK_NAMES, test_examples
from experiments.triple.mixes import mixes
from experiments.triple.model import END, START, build_model, build_tokenizer
from experiments.triple.packing import IGNORED, IMAGE_TOKENS, Packer
from experiments.triple.replies import BATCH, MAX_REPLY
from experiments.triple.rl import RL, drawn
from experiments.triple.supervised import DrawRows, Schedule
from interp.plan.images import pictures_of
from interp.plan.prompts import stated
from interp.plan.runs import Runs
from interp.plan.structure import Weightless, of_model
from interp.plan.training import TrainingPlan
from interp.plan.work import Work, together
from interp.prompts import Prompt

SOME = 4
"""Steps whose rows are drawn, to stand for all."""
A_TASK = 8
"""Questions of a task, likewise."""


def structure(config: Any, settings: PlanSettings) -> Weightless:
    """The architecture that is trained."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = build_model(build_tokenizer(), config.size, config.seed)
    return of_model(model, None, settings.on)


def supervised(
    runs: Runs,
    packer: Packer,
    draw_rows: DrawRows,
    schedule: Schedule,
    seed: int,
    sees: bool,
    frozen: Sequence[str] = (),
) -> Work:
    """A supervised stage on packed rows; `draw_rows` as in `experiments.triple.supervised.turns_loss`."""
    plan, found = TrainingPlan(runs, frozen, sees), []
    for step in range(min(SOME, schedule.steps)):
        packed = packer.pack(*draw_rows(np.random.default_rng([seed, step])))
        rows, width = packed["input_ids"].shape
        learnt = int((packed["labels"][:, 1:] != IGNORED).sum())
        pictures = pictures_of(runs.vlm, stated(rows, IMAGE_TOKENS + 1, IMAGE_TOKENS))
        found.append(plan.step(rows, width, pictures, learnt))
    return replace(together("steps", found).times(schedule.steps / len(found)), scales=False)


def aligned(runs: Runs, schedule: Schedule) -> Work:
    """The stage that shows the vision tower words, without the decoder."""
    pictures = pictures_of(runs.vlm, stated(schedule.batch, IMAGE_TOKENS + 1, IMAGE_TOKENS))
    one = TrainingPlan(runs).step(schedule.batch, 0, pictures, 0, images=True)
    return replace(one.times(schedule.steps), what="base: align", scales=False)


def reinforced(runs: Runs, rl: RL, seed: int, tokens: int, frozen: Sequence[str] = ()) -> Work:
    """GRPO on the synthetic scenes."""
    packer = Packer(build_tokenizer(), 1)
    asked = [task.question(arguments) for task, _, arguments in islice(drawn(rl, seed), SOME * rl.prompts)]
    prompts = _prompts(packer, asked)
    plan = TrainingPlan(runs, frozen)
    groups = [prompts[first : first + rl.prompts] for first in range(0, len(prompts), rl.prompts)]
    steps = [plan.group_step(group, rl.samples, tokens, shared=True) for group in groups]
    return replace(together("steps", steps).times(rl.steps / len(steps)), scales=False)


def measured(runs: Runs, n: int, tokens: int, more: int = 0) -> Work:
    """`experiments.triple.evaluate.measure`: replies to n questions a task, whose prompts are longer by `more`."""
    some = min(n, A_TASK)
    asked = [example.question for example in test_examples(some)]
    prompts = _prompts(Packer(build_tokenizer(), 1), asked, more)
    written = Runs(runs.vlm, BATCH).written("replies", prompts, [tokens] * len(prompts))
    return written.times(n * len(TASK_NAMES) / len(prompts))


def tokens_of(bench: Bench) -> int:
    """Of a reply."""
    return MAX_REPLY if bench.settings.trace_tokens is None else bench.settings.trace_tokens


def saved(runs: Runs) -> int:
    """Bytes of a stage on disk: its checkpoint, and what training goes on from."""
    return 4 * runs.footprint.weights()


def _prompts(packer: Packer, asked: Sequence[str], more: int = 0) -> list[Prompt]:
    """By numbers: an image and a question each."""
    found: list[Prompt] = []
    for question in asked:
        tokens = len(packer.prefix) + len(packer.encode(f"{question} {END} {START} assistant"))
        found += stated(1, tokens + more, IMAGE_TOKENS)
    return found


def work(bench: Bench, config: Any) -> Iterator[Work]:
    """What `experiments.triple.train.run` computes."""
    runs, tokens = bench.runs(1), tokens_of(bench)
    packer = Packer(build_tokenizer(), config.size.patch)
    base, cold, more = mixes(config)
    whole = saved(runs)
    yield aligned(runs, config.align)
    seen = supervised(runs, packer, base, config.perception, config.seed, sees=False)
    yield replace(seen, what="base: perception", disk=whole)
    yield replace(
        supervised(runs, packer, cold, config.cold_start, config.seed, sees=True),
        what="in: cold start",
        disk=whole,
    )
    rl = replace(reinforced(runs, config.rl, 0, tokens), disk=whole)
    yield replace(rl.times(config.seeds), what=f"rl: {config.seeds} runs of GRPO")
    if config.control:
        taught = supervised(runs, packer, more, config.control_schedule, config.seed, sees=True)
        share = min(1.0, rl.flops / taught.flops)
        yield replace(taught.times(share), what="control, as long as rl-0", disk=whole)
    models = 2 + config.seeds + config.control
    told = measured(runs, config.n, tokens).times(models)
    yield replace(told, what=f"replies of {models} models")
    yield replace(measured(runs, config.n, tokens, more=1), what="replies of IN, made to think")


def assumed(bench: Bench, config: Any) -> Iterator[str]:
    """What `work` takes for granted."""
    yield f"replies and samples of {tokens_of(bench)} tokens; rows like those of the first {SOME} steps of a stage"
    if config.control:
        yield "the control goes on for as much arithmetic as rl-0 took, or to the end of its steps"
