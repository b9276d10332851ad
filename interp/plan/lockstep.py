"""What lockstep generation and steering compute: texts of two models at once, each read again by its parents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from interp.plan.prompts import with_trace
from interp.plan.runs import Runs, of_trace
from interp.plan.work import Work, together
from interp.prompts import Prompt


def moved(runs: Runs, prompts: Sequence[Prompt], tokens: int, conditions: int, directions: int = 2) -> Work:
    """`interp.lockstep.confirm`: the models alone, then every condition in every direction.

    Args:
        runs: of the models.
        prompts: what is asked.
        tokens: that each text has.
        conditions: sets of components, random ones among them.
        directions: ways they are moved.
    """
    once = runs.written("texts", prompts, [tokens] * len(prompts))
    whole = max(len(prompt) for prompt in prompts) + tokens
    cache = runs.footprint.keys(min(runs.batch_size, len(prompts)), whole)
    both = together("texts", [once.times(2)]).beside("keys and values of the donor", cache)
    traces = [with_trace(prompt, tokens) for prompt in prompts]
    followed = runs.read("choices of both parents", traces, of_trace, 2)
    runs_of_one = together("components moved", [both, followed]).times(conditions * directions)
    return together("components moved, and both models alone", [once.times(2), runs_of_one])


def steered(runs: Runs, prompts: Sequence[Prompt], tokens: int, conditions: int) -> Work:
    """`interp.steering.steer_both`: both models as they are, and under every direction and coefficient."""
    once = runs.written("texts", prompts, [tokens] * len(prompts))
    return replace(once.times(2 * (1 + conditions)), what="both models, directions added")


def directions(runs: Runs, prompts: Sequence[Prompt], tokens: int) -> Work:
    """`interp.steering.pair_directions`: RL's text, read by both models."""
    once = runs.written("texts", prompts, [tokens] * len(prompts))
    traces = [with_trace(prompt, tokens) for prompt in prompts]
    read = runs.written("traces read", traces, [1] * len(traces)).times(2)
    return together("directions, from RL's texts", [once, read])
