"""What `frankenlens localize` does to a model, as its settings say, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.bench import Bench, tried
from experiments.settings import is_public
from hooks import HookedVLM
from hooks.errors import FrankenlensError
from interp.localization import (
    SYNTHETIC,
    Ablation,
    FunctionPairs,
    Swap,
    layers_of,
    singles,
    suffixes,
    windows,
)
from interp.localization.pairs import SELF
from interp.localization.swap import paired_prompts
from interp.localization.together import COUNTERFACTUAL
from interp.plan.localization import ablated, swapped
from interp.plan.prompts import SAMPLE
from interp.plan.work import Work
from interp.prompts import Prompt
from interp.questions.readers import FUNCTIONS as PAPER_FUNCTIONS


def has_pairs(config: Any) -> bool:
    """Whether the settings name pairs of images, not single questions."""
    return config.data is None or not (config.data.is_file() or is_public(str(config.data)))


def width_of(mode: str) -> int | None:
    """The width of a window; None for the other modes."""
    if mode in ("single", "suffix"):
        return None
    name, _, width = mode.partition(":")
    if name != "window" or not width.isdecimal() or int(width) < 1:
        raise FrankenlensError(f"--modes has {mode!r}; choose of single, suffix, window:3 (any width).")
    return int(width)


def swaps_of(mode: str, n_layers: int, what: str) -> list[Swap]:
    """The swaps of a way of swapping.

    Raises:
        FrankenlensError: a window is wider than the model is deep.
    """
    width = width_of(mode)
    if width is None:
        return singles(n_layers, what) if mode == "single" else suffixes(n_layers, what)
    if width > n_layers:
        raise FrankenlensError(f"--modes {mode}: the decoder has {n_layers} layers.")
    return windows(n_layers, width, what)


def ablations_of(vlm: HookedVLM, config: Any) -> list[Ablation]:
    """All that the settings name."""
    every = dict.fromkeys(one for kind in config.kinds for one in layers_of(vlm, config.parts, kind))
    return [one for one in every if one.kind != "skip" or "skip" in config.kinds]


@dataclass(frozen=True)
class _Planned:
    """Prompts that stand for all pairs and questions, and how many there are.

    Attributes:
        pairs: kind to some of its pairs, and how many it has.
        questions: some of those that ablations are scored on, and how many there are.
    """

    pairs: Mapping[str, tuple[Sequence[tuple[Prompt, Prompt]], int]]
    questions: tuple[Sequence[Prompt], int]


def _some(bench: Bench, config: Any) -> _Planned:
    if bench.settings.tokens is not None:
        known = SYNTHETIC if config.data is None else PAPER_FUNCTIONS
        n, ready = config.n * (len(config.functions or known) if has_pairs(config) else 1), bench.prompts
        sizes = (
            {COUNTERFACTUAL: n, "itself": n // config.n * min(SELF, config.n)} if has_pairs(config) else {}
        )
        sizes |= {"same answer": n} if config.data is None else {}
        own = {
            kind: ([(one, one) for one in ready[: min(len(ready), size)]], size)
            for kind, size in sizes.items()
        }
        return _Planned(own, (ready, n + config.n * len(config.tasks)))
    asked: FunctionPairs = bench.questions.loaded
    pairs = {}
    for kind, every in {COUNTERFACTUAL: asked.pairs, **asked.controls}.items():
        if every:
            made = paired_prompts(bench.builder, every[:: -(-len(every) // SAMPLE)], config.resize)[0]
            pairs[kind] = (list(made.values()), len(every))
    some = asked.questions[:: max(1, -(-len(asked.questions) // SAMPLE))]
    return _Planned(pairs, ([bench.builder.build(one) for one in some], len(asked.questions)))


def work(bench: Bench, config: Any) -> Iterator[Work]:
    """What `measure` computes, counted and not run."""
    some, runs, tokens = _some(bench, config), bench.runs(), bench.trace_tokens
    yield tried(bench, bench.prompts, bench.n, 1)
    n_layers = bench.vlm.n_layers
    swaps = list(dict.fromkeys(one for mode in config.modes for one in swaps_of(mode, n_layers, config.what)))
    for kind, (pairs, n) in some.pairs.items() if swaps else ():
        made = swapped(runs, pairs, swaps, tokens).times(n / len(pairs))
        yield replace(made, what=f"{len(swaps)} swaps: {kind}")
    if config.parts:
        prompts, n = some.questions
        chosen = ablations_of(bench.vlm, config)
        made = ablated(runs, prompts, chosen, tokens).times(n / len(prompts))
        yield replace(made, what=f"{len(chosen)} ablations")


def assumed(bench: Bench, config: Any) -> Iterator[str]:
    """What `work` takes for granted."""
    some = _some(bench, config)
    pairs = ", ".join(f"{n} pairs ({kind})" for kind, (_, n) in some.pairs.items())
    yield f"{pairs or 'no pairs'}; {some.questions[1]} questions; answers of {bench.trace_tokens} tokens, all read"
