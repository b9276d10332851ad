"""Every method that runs models over prompts, on the pair that ships: a few prompts at once, and what comes of them.

What holds of all of them (that numbers do not depend on how many run at once) is tested over `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from hooks import HookedVLM
from hooks.uninterrupted import registered
from interp.attention import attention_mass
from interp.decision import DecisionSet, find_decisions, two_by_two
from interp.knockout import Knockout, knockout_effects, routes
from interp.lens import direct_logit_attribution, logit_lens
from interp.localization import Ablation, Swap, ablate, vision_swap
from interp.lockstep import Moved, follow, lockstep
from interp.map import attribute, component_map, verify
from interp.metrics import evaluate
from interp.pair import Pair, greedy
from interp.paths import path_effects, paths_in_order
from interp.prompts import Prompt
from interp.questions.tasks import sample
from interp.steering import Direction, Steering, differences, steer
from interp.sweep import Intervention, sweep

N, WRITTEN = 4, 12
"""Prompts, and tokens that are written after each."""
Numbers = Mapping[str, np.ndarray]


@dataclass
class Asked:
    """A pair, and what it is asked."""

    pair: Pair

    @cached_property
    def decisions(self) -> DecisionSet:
        """Of all prompts, each with what RL wrote."""
        return find_decisions(
            self.pair, sample("sum", N, 5, "map"), "soft", max_new_tokens=WRITTEN, progress=False
        )

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Without traces."""
        return [self.pair.builder.build(one) for one in sample("sum", N, 5, "map")]

    @cached_property
    def first(self) -> DecisionSet:
        """The same prompts up to the first token that the models differ in."""
        some = sample("sum", N, 5, "map")
        return find_decisions(self.pair, some, "first", max_new_tokens=WRITTEN, progress=False)

    @cached_property
    def attributed(self) -> xr.Dataset:
        """Estimates of the MLPs."""
        return attribute(self.pair, self.decisions, points=("mlp_out",), progress=False)

    @property
    def models(self) -> list[HookedVLM]:
        return [self.pair.in_, self.pair.rl]


def _of(found: Any, *names: str) -> Numbers:
    return {name: np.asarray(found[name].values) for name in names}


def _written(rows: list[Any]) -> Numbers:
    """Token ids, as numbers: they must be the same."""
    return {
        str(i): np.array(list(getattr(row, "tokens", row)), dtype=float) * 1e6 for i, row in enumerate(rows)
    }


def _evaluate(asked: Asked) -> Numbers:
    given = asked.decisions
    return {"value": evaluate(asked.pair.rl, given.prompts, given.metric)}


def _greedy(asked: Asked) -> Numbers:
    return _written(greedy(asked.pair.rl, asked.prompts, WRITTEN))


def _sweep(asked: Asked) -> Numbers:
    heads = [Intervention(f"blocks.{i}.attn.hook_result", "replace", index=1) for i in (1, 4)]
    other = [
        Intervention("blocks.2.hook_mlp_out", "mean", "image"),
        Intervention("blocks.3.attn.hook_z", "resample", index=0),
    ]
    given = asked.decisions
    found = sweep(
        asked.pair.in_, given.prompts, heads + other, given.metric, donor=asked.pair.rl, progress=False
    )
    return _of(found, "value", "clean")


def _component_map(asked: Asked) -> Numbers:
    settings: dict[str, Any] = {"points": ("mlp_out",), "roles": ("all",), "n_random": 1, "progress": False}
    return _of(component_map(asked.pair, asked.decisions, **settings), "effect", "control_other", "donor")


def _attribute(asked: Asked) -> Numbers:
    found = attribute(asked.pair, asked.decisions, points=("mlp_out", "head"), neurons=True, progress=False)
    return _of(found, "effect", "neuron_effect", "recipient", "donor")


def _verify(asked: Asked) -> Numbers:
    return _of(
        verify(asked.attributed, asked.pair, asked.decisions, top_k=2, progress=False), "estimate", "exact"
    )


def _path_effects(asked: Asked) -> Numbers:
    given, paths = asked.decisions, ["blocks.1.mlp -> blocks.4.attn.head.1.q", "blocks.1.mlp -> logits"]
    found = path_effects(
        asked.pair.in_, given.prompts, given.metric, paths, donor=asked.pair.rl, progress=False
    )
    return _of(found, "direct", "whole", "direct_other")


def _paths_in_order(asked: Asked) -> Numbers:
    given, paths = asked.decisions, ["blocks.1.mlp -> blocks.4.attn.head.1.q", "blocks.1.mlp -> logits"]
    found = paths_in_order(
        asked.pair.in_, given.prompts, given.metric, paths, donor=asked.pair.rl, progress=False
    )
    return _of(found, "in_order")


def _knockout(asked: Asked) -> Numbers:
    cuts = [
        Knockout("image", "decision", (2, 4)),
        Knockout("image", "question", 1),
        Knockout("image", "decision", 3, heads=(0,), mass="lost"),
        Knockout("all", "all", 0, tower="vision", heads=(0,)),
    ]
    given = asked.decisions
    found = knockout_effects(asked.pair.rl, given.prompts, cuts, given.metric, progress=False)
    return _of(found, "value", "clean", "n_edges")


def _routes(asked: Asked) -> Numbers:
    given = asked.decisions
    cuts = {"seeing": [Knockout("image", "question", (3, 5))]}
    found = routes(asked.pair, given.prompts, cuts, given.metric, progress=False)
    return _of(found, "value", "control", "clean")


def _logit_lens(asked: Asked) -> Numbers:
    found = logit_lens(asked.pair.rl, asked.decisions.prompts, where="decision", progress=False)
    return {
        str(name): found[name].values
        for name in found.data_vars
        if np.issubdtype(found[name].dtype, np.floating)
    }


def _direct_logit_attribution(asked: Asked) -> Numbers:
    found = direct_logit_attribution(asked.pair, asked.decisions.prompts, 45, progress=False)
    return _of(found, "contribution", "logit")


def _attention_mass(asked: Asked) -> Numbers:
    return {"mass": attention_mass(asked.pair.rl, asked.decisions.prompts, "reasoning", "image")}


def _two_by_two(asked: Asked) -> Numbers:
    return {"value": two_by_two(asked.pair, asked.first).values}


def _ablate(asked: Asked) -> Numbers:
    ablations = [Ablation("blocks.2.attn.head.1", "mean"), Ablation("blocks.3.mlp", "resample")]
    found = ablate(
        asked.pair.rl, asked.prompts, ablations, grader=lambda answer, example: True, max_new_tokens=24,
        progress=False,
    )  # fmt: skip
    return {"right": found["right"].values, "parsed": found["parsed"].values.astype(float)}


def _vision_swap(asked: Asked) -> Numbers:
    some = sample("sum", N + 1, 5, "map")
    pairs = [(one, replace(other, question=one.question)) for one, other in pairwise(some)]
    found = vision_swap(
        asked.pair.rl, asked.pair.builder, pairs, [Swap(1, 3)], max_new_tokens=48,
        progress=False,
    )  # fmt: skip
    return {"outcome": found["outcome"].values}


def _lockstep(asked: Asked) -> Numbers:
    moved = Moved("blocks.3.mlp", ("prefill", "generated"))
    return _written(lockstep(asked.pair.rl, asked.pair.in_, asked.prompts, moved, WRITTEN))


def _follow(asked: Asked) -> Numbers:
    written = lockstep(asked.pair.rl, asked.pair.in_, asked.prompts, (), WRITTEN)
    own = [list(one.tokens) for one in written]
    return {"share": np.array([one.share for one in follow(asked.pair.rl, written, own)])}


def _direction(asked: Asked) -> Tensor:
    return differences(asked.pair, asked.decisions.prompts, "blocks.3.hook_resid_post", ("generated",))


def _differences(asked: Asked) -> Numbers:
    return {"difference": _direction(asked).numpy()}


def _steer(asked: Asked) -> Numbers:
    vector = torch.linspace(-1, 1, asked.pair.rl.d_model)
    direction = Direction("up", "blocks.3.hook_resid_post", vector)
    steering = Steering(direction, 2.0, ("prefill", "generated"))
    return _written(steer(asked.pair.rl, asked.prompts, steering, WRITTEN))


METHODS: dict[str, Callable[[Asked], Numbers]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _evaluate, _greedy, _sweep, _component_map, _attribute, _verify, _path_effects, _paths_in_order, _knockout,
        _routes, _logit_lens, _direct_logit_attribution, _attention_mass, _two_by_two, _ablate, _vision_swap,
        _lockstep, _follow, _differences, _steer,
    )
}  # fmt: skip


class Widest:
    """The most rows that an MLP was given at once."""

    rows = 0


@contextmanager
def watched(
    asked: Asked, most: int | None = None, full: Callable[[], None] | None = None
) -> Iterator[Widest]:
    """How many rows the models' MLPs are given at once; with more than `most`, `full` is called, which raises.

    Args:
        asked: whose models.
        most: rows that there is memory for; None: any number.
        full: raises what a device raises that is full.
    """
    widest = Widest()

    def count(module: Any, args: tuple) -> None:
        rows = args[0].shape[0]
        if most is not None and rows > most and full is not None:
            full()
        if args[0].shape[:2] != (1, 1):  # a token alone, by which shapes are asked
            widest.rows = max(widest.rows, rows)

    blocks = [(vlm, block) for vlm in asked.models for block in vlm.anatomy.text.blocks]
    modules = [vlm.module(block.mlp) for vlm, block in blocks]
    with registered(*(lambda m=m: m.register_forward_pre_hook(count) for m in modules)):
        yield widest


def differing(found: Numbers, expected: Numbers) -> str:
    """What of these is not the same within 1e-5 of its largest number, and of 1; "" where nothing is."""
    for name, theirs in expected.items():
        ours = found[name]
        if ours.shape != theirs.shape or not np.array_equal(np.isnan(ours), np.isnan(theirs)):
            return f"{name}: other shape, or NaN elsewhere"
        scale = max(1.0, float(np.nanmax(np.abs(theirs), initial=0.0)))
        off = float(np.nanmax(np.abs(ours - theirs), initial=0.0))
        if not off <= 1e-5 * scale:
            return f"{name}: off by {off:.3g}, largest {scale:.3g}"
    return ""
