"""What `frankenlens planted` takes, counted from its settings and not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from experiments.bench import Bench, tried
from experiments.retraining import plants
from experiments.settings import load_examples
from experiments.triple.mixes import QUESTIONS, REASONING_SHARE
from experiments.triple.model import build_tokenizer
from experiments.triple.packing import Packer
from experiments.triple.plan import reinforced, supervised, tokens_of
from experiments.triple.supervised import traces
from interp.plan.decisions import set_aside
from interp.plan.planting import TrialPlan, effect
from interp.plan.prompts import SAMPLE, Workload
from interp.plan.runs import of_trace
from interp.plan.work import Work, together
from interp.planting import DRAWN, NULLS, TRAINED, WIRED, Draws, Plant
from interp.prompts import Prompt

FITTED = 4
"""Sets of a pair's prompts that a donor is put together on."""


def work(bench: Bench, config: Any) -> Iterator[Work]:
    """Its steps."""
    prompts, n = _asked(bench, config)
    yield tried(bench, prompts, n if config.data is not None else config.n)
    asked = bench.asking(prompts, config.n)
    alone = effect(bench.runs(), asked).times(asked.scale)
    yield replace(alone.times(config.noise_pairs), what=f"{config.noise_pairs} noise pairs", scales=False)
    for kind in config.planted:
        pairs = config.pairs_of(kind)
        made = list(_of_one(bench, config, kind, asked, alone))
        yield replace(together(f"{pairs} pairs of kind {kind}", made).times(pairs), scales=False)


def _of_one(bench: Bench, config: Any, kind: str, asked: Workload, alone: Work) -> Iterator[Work]:
    """A pair of a kind: its donor, each of its components alone, every method, and the map's marks."""
    runs, draws = bench.runs(), Draws(bench.vlm, bench.vlm, config.changed, config.components, config.change)
    yield from _donors(bench, config, kind, asked)
    yield alone.times(_changed(draws, config, kind))
    trial = TrialPlan(runs, asked, draws.among(kind), bench.at_tokens)
    yield trial.work(config.methods).times(asked.scale)
    if config.marks:
        yield from _donors(bench, config, kind, asked)
        yield trial.marks().times(asked.scale)


def _changed(draws: Draws, config: Any, kind: str) -> int:
    """Components that change, each of which is planted alone."""
    if kind in NULLS:
        return 0
    if kind in DRAWN:
        return config.changed
    plant: Plant = draws.plant(kind, 0)
    return sum(plant.holds(one.name) for one in draws.among(kind))


def _donors(bench: Bench, config: Any, kind: str, asked: Workload) -> Iterator[Work]:
    """What a donor that is no RL takes."""
    runs = bench.runs()
    if kind in WIRED:
        texts = runs.written("texts", asked.prompts, [asked.trace_tokens] * len(asked.prompts))
        seen = runs.read("what MLPs read and do", asked.traces, of_trace, 2)
        yield set_aside(together("donor", [texts, seen]), runs).times(FITTED * asked.scale)
    if kind in TRAINED:
        rest = (f"blocks.0-{bench.vlm.n_layers - 1}",)
        if kind == "reinforced":
            yield reinforced(runs, plants.REINFORCED, 0, tokens_of(bench), rest)
            return
        packer = Packer(build_tokenizer(), bench.vlm.model.config.vision_config.patch_size)  # type: ignore[union-attr]
        rows = traces(REASONING_SHARE, 0.0, plants.SUPERVISED.batch, QUESTIONS)
        yield supervised(runs, packer, rows, plants.SUPERVISED, 0, sees=False, frozen=rest)


def _asked(bench: Bench, config: Any) -> tuple[Sequence[Prompt], int]:
    """Prompts like those of a pair, and how many the data has."""
    if bench.settings.tokens is not None or config.data is not None:
        return bench.prompts[: config.n], bench.n
    examples = load_examples(config, config.seed)[0]
    some = examples[:: -(-len(examples) // SAMPLE)]
    return [bench.builder.build(one) for one in some], len(examples)


def assumed(bench: Bench, config: Any) -> Iterator[str]:
    """What `work` takes for granted."""
    yield f"{config.n} prompts a pair, with texts of {bench.trace_tokens} tokens that all can be scored on"
    if set(config.planted) & set(TRAINED):
        yield "donors that are trained: gradients go back to the first layer"
    if set(config.planted) & set(WIRED):
        yield "donors that are put together: two passes over what they are fitted to"
