"""What `frankenlens freeze` takes, counted from its settings and not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from experiments.bench import Bench, PlanSettings, tried
from experiments.papers import paper_questions
from experiments.retraining.arms import Arm, plan_arms
from experiments.retraining.recipe import read_trl
from experiments.settings import Questions, checkpoints, load_examples
from experiments.triple.plan import measured, reinforced, saved, tokens_of
from interp.fine_grained import METRICS
from interp.fine_grained.questions import NEEDS
from interp.plan.prompts import variants_of
from interp.plan.runs import Runs
from interp.plan.structure import Weightless, weightless
from interp.plan.training import TrainingPlan
from interp.plan.work import Work, together
from interp.regions import parse_partition

ALL = 10**7
"""Questions of a file."""


def load(config: Any) -> Questions:
    """What is measured, in place of what the command loads, which trains."""
    if config.paper:
        return paper_questions(config, config.seed, METRICS)
    examples, left_out = load_examples(replace(config, n=ALL), 0)
    tasks = dict.fromkeys(example.task for example in examples)
    some = [[one for one in examples if one.task == task][: config.n] for task in tasks]
    return Questions([example for own in some for example in own], left_out)


def structure(config: Any, settings: PlanSettings) -> Weightless:
    """Of IN, in the type that it is trained in."""
    dtype = "float32" if config.dtype == "auto" else config.dtype
    return weightless(checkpoints(config)[0], dtype, settings.on)


def work(bench: Bench, config: Any) -> Iterator[Work]:
    """Its steps."""
    runs, arms = bench.runs(), arms_of(bench, config)
    open_ones = {"weights of IN and RL": 2 * runs.footprint.weights()}
    if config.train is not None:
        yield _beside(tried(bench, bench.prompts, bench.n), open_ones)
        yield from (_beside(one, open_ones) for one in _described(bench, config))
    for arm in arms:
        trained = replace(_trained(bench, config, arm), what=f"{arm.name}, seed {arm.trained_with}")
        yield replace(trained, disk=saved(runs), scales=False)
    told = together("replies", _measured(bench, config)).times(2 + len(arms))
    three = _beside(told, {"weights of IN, RL and a run": 3 * runs.footprint.weights()})
    yield replace(three, what=f"replies of IN, RL and {len(arms)} runs")


def arms_of(bench: Bench, config: Any) -> Sequence[Arm]:
    """The runs that there will be."""
    partition = parse_partition(config.partition, bench.vlm.n_layers)
    regions = config.regions or tuple(partition.regions)
    return plan_arms(partition, regions, config.random, config.reruns, config.also, config.seed, config.seeds)


def _trained(bench: Bench, config: Any, arm: Arm) -> Work:
    rl = config.training
    if config.train is None:
        return reinforced(bench.runs(), rl, arm.trained_with, tokens_of(bench), arm.addresses)
    checkpointed = bool(read_trl(config.trl).get("gradient_checkpointing", True))
    plan = TrainingPlan(bench.runs(), arm.addresses, checkpointed=checkpointed)
    some = [bench.prompts[i % len(bench.prompts)] for i in range(rl.prompts)]
    return plan.group_step(some, rl.samples, bench.trace_tokens, shared=False).times(rl.steps)


def _described(bench: Bench, config: Any) -> Iterator[Work]:
    if config.paper:
        prompts = bench.prompts
        one = bench.runs().written("descriptions by IN", prompts, [bench.trace_tokens] * len(prompts))
        yield one.times(bench.scale)


def _measured(bench: Bench, config: Any) -> Iterator[Work]:
    """What one model is asked."""
    runs, tokens = bench.runs(), bench.trace_tokens
    if config.train is None:
        yield measured(Runs(bench.vlm, 1), config.n, tokens_of(bench))
        return
    if not config.paper:
        yield runs.written("replies", bench.prompts, [tokens] * len(bench.prompts)).times(bench.scale)
        return
    own = variants_of(bench.prompts, tokens)
    for prompts in (own[variant] for metric in METRICS for variant in NEEDS[metric] if own[variant]):
        yield runs.written("replies", prompts, [tokens] * len(prompts)).times(config.n / len(prompts))


def assumed(bench: Bench, config: Any) -> Iterator[str]:
    """What `work` takes for granted."""
    rl = config.training
    yield f"{len(arms_of(bench, config))} runs of {rl.steps} steps, {rl.prompts} prompts x {rl.samples} samples"
    if config.train is None:
        yield f"replies and samples of {tokens_of(bench)} tokens"
    else:
        yield f"questions to train on are like those at hand; replies and samples of {bench.trace_tokens} tokens"
        yield "weights and what Adam keeps are in one place, in one type; no vLLM, no DeepSpeed"


def _beside(work: Work, held: dict[str, int]) -> Work:
    return replace(work, held={**work.held, **held})
