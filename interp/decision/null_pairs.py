"""Pairs in which nothing was learnt: what a denominator, and a cell of a map, must lie above."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from interp.decision.result import DecisionSet
from interp.decision.traces import next_tokens, trace_logits
from interp.metrics import LogitDifference, Metric, SoftDifference, evaluate
from interp.pair.pair import Pair
from interp.prompts import Prompt
from interp.statistics import Interval, bootstrap_mean

Change = Callable[[str, Tensor], Tensor]
"""A parameter's name and value to its new value."""
NOISE_PAIRS = 4
"""Random updates that say what a pair that learnt nothing looks like."""


@torch.no_grad()
def null_pair_denominator(
    pair: Pair,
    decisions: DecisionSet,
    seed: int = 0,
    batch_size: int = 32,
    n_draws: int = NOISE_PAIRS,
    **settings: Any,
) -> dict[str, Interval]:
    """The denominator of pairs in which nothing was learnt.

    Two kinds of such pairs: `bf16`, RL and RL rounded to bfloat16 (nothing to learn from where RL is kept in it
    already, so left out there); `random`, IN and IN with an update of the same norm as RL's in every tensor, but in a
    random direction (in half precision RL's own update with its entries shuffled: a Gaussian of that norm would mostly
    round away). Each with the same metric at the same decisions, and (`, own decisions`) at the decisions found for
    itself: a difference that is selected is never 0 on average, whatever made it. For `decisive` those are the pair's
    own first divergences.

    Arguments:
        seed: of the first random direction; the others have those that follow (`random_changes`).
        n_draws: random pairs; the one whose interval reaches highest is given, once for each reading.
        settings: as in `interp.statistics.bootstrap_mean`.

    Raises:
        FrankenlensError: n_draws is below 1.
    """
    if n_draws < 1:
        raise FrankenlensError(f"n_draws is {n_draws}; at least one random pair must stand beside the pair")
    changes = [(name, *one) for name, one in null_changes(pair, seed).items()]
    later = random_changes(pair, range(seed + 1, seed + n_draws))
    changes += [("random", pair.in_, change) for change in later]
    traces = {"bf16": (decisions.rl_values, decisions.rl_traces)}
    traces["random"] = (decisions.in_values, decisions.in_traces)
    found: dict[str, Interval] = {}
    for label, vlm, change in changes:
        before, written = traces[label]
        with changed_weights(vlm.model, change):
            after = evaluate(vlm, decisions.prompts, decisions.metric, batch_size)
            own_before = _own(decisions.choice)(vlm, written, batch_size)
        for name, values in ((label, after - before), (f"{label}, own decisions", own_before())):
            new = bootstrap_mean(values, **settings)
            if name not in found or not _end(found[name]) >= _end(new):
                found[name] = new
    return found


def _end(interval: Interval) -> float:
    """How high it reaches; too few examples for an interval: their mean is all there is to compare with."""
    return float(interval.value if np.isnan(interval.high) else interval.high)


def null_changes(pair: Pair, seed: int = 0) -> dict[str, tuple[HookedVLM, Change]]:
    """By name, a model of the pair and a change of its weights (for `changed_weights`) from which nothing is learnt.

    `bf16`: RL rounded to bfloat16 (not where it is kept in it already). `random`: IN with an update of the same norm as
    RL's in every tensor, but in a random direction; in half precision RL's own update with its entries shuffled.

    Arguments:
        seed: of the random directions; drawn anew each time the change is made to the first parameter.
    """

    def rounded(name: str, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16).to(weight.dtype)

    (shifted,) = random_changes(pair, [seed])
    changes: dict[str, tuple[HookedVLM, Change]] = {"bf16": (pair.rl, rounded), "random": (pair.in_, shifted)}
    if pair.rl.model.dtype == torch.bfloat16:
        del changes["bf16"]
    return changes


def random_changes(pair: Pair, seeds: Sequence[int]) -> list[Change]:
    """Updates of the same norm as RL's in every tensor, but in a random direction; of one model or the other.

    In half precision RL's own update with its entries shuffled. Together they hold one more copy of the weights.

    Arguments:
        seeds: one a change; drawn anew each time the change is made to the first parameter.
    """
    updates = {name: theirs.float() - ours.float() for name, ours, theirs in _both(pair)}
    return [_random_change(updates, seed) for seed in seeds]


def _random_change(updates: Mapping[str, Tensor], seed: int) -> Change:
    generator, first = torch.Generator(), next(iter(updates))

    def shifted(name: str, weight: Tensor) -> Tensor:
        if name == first:
            generator.manual_seed(seed)
        update = updates[name]
        if weight.dtype == torch.float32:
            noise = torch.randn(weight.shape, generator=generator).to(update)
            update = noise * (update.norm() / noise.norm())
        else:
            order = torch.randperm(update.numel(), generator=generator).to(update.device)
            update = update.flatten()[order].view_as(update)
        return (weight.float() + update.to(weight.device)).to(weight.dtype)

    return shifted


def own_decisions(
    vlm: HookedVLM, before: HookedVLM, traces: Sequence[Prompt], choice: str, batch_size: int
) -> tuple[list[Prompt], Metric]:
    """The decisions of a model that was changed, found as those of a pair are: its own, whatever the pair's are.

    Arguments:
        vlm: as it is now.
        before: the model that it was made from.
        traces: what `before` wrote.
        choice: of the pair's decisions. `soft`: everywhere on the traces; else the first divergence from each.

    Returns:
        The prompts that have one, and the metric: now against before.
    """
    if choice != "soft":
        return _first_divergences(vlm, traces, batch_size)
    runs = [trace_logits(one, traces, batch_size) for one in (vlm, before)]
    weights = tuple(now.softmax(-1) - then.softmax(-1) for (_, now), (_, then) in zip(*runs, strict=True))
    start = torch.tensor([trace.n_prompt_tokens - 1 for trace in traces], dtype=torch.long)
    return list(traces), SoftDifference(weights, start)


def _own(choice: str) -> Callable[[HookedVLM, Sequence[Prompt], int], Callable[[], np.ndarray]]:
    return _own_soft if choice == "soft" else _own_first


def _first_divergences(
    vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int
) -> tuple[list[Prompt], LogitDifference]:
    prompts, now, before = [], [], []
    for trace, logits in trace_logits(vlm, traces, batch_size):
        written, chosen = torch.tensor(trace.trace_ids), next_tokens(trace, logits)
        if places := torch.nonzero(chosen != written).flatten().tolist():
            prompts.append(trace.truncated(trace.n_prompt_tokens + places[0]))
            now.append(int(chosen[places[0]]))
            before.append(int(written[places[0]]))
    ids = (torch.tensor(some, dtype=torch.long) for some in (now, before))
    return prompts, LogitDifference(*ids)


def _own_first(vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int) -> Callable[[], np.ndarray]:
    """At the first divergence of the model as it is now from its traces: log odds of the two tokens.

    Returns:
        A function that subtracts the log odds under the weights that the model has when it is called.
    """
    prompts, metric = _first_divergences(vlm, traces, batch_size)
    values = evaluate(vlm, prompts, metric, batch_size)
    return lambda: values - evaluate(vlm, prompts, metric, batch_size)


def _own_soft(vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int) -> Callable[[], np.ndarray]:
    """As `_own_first`, for the soft metric: its denominator is KL(p || q) + KL(q || p), summed over the trace."""
    now = [logits.log_softmax(-1) for _, logits in trace_logits(vlm, traces, batch_size)]

    def difference() -> np.ndarray:
        before = (logits.log_softmax(-1) for _, logits in trace_logits(vlm, traces, batch_size))
        return np.array([((p.exp() - q.exp()) * (p - q)).sum() for p, q in zip(now, before, strict=True)])

    return difference


def recovery_refused(decisions: DecisionSet, nulls: Mapping[str, Interval], **settings: Any) -> str:
    """Why no recovery may be printed; `""` if it may.

    A recovery is a share of the denominator, so without a denominator clear of those of pairs without a change, noise
    too would draw a full map.
    """
    own = decisions.denominator(**settings)
    if not np.isfinite([own.low, own.high]).all():
        return f"the denominator has no interval: {int(own.n)} decisions"
    if bool(own.includes(0.0)):
        return f"the interval of the denominator, {_shown(own)}, includes 0"
    for name, null in nulls.items():
        if bool(own.low <= _end(null)):
            return (
                f"the denominator, {_shown(own)}, is not above that of a pair that learnt nothing "
                f"({name}), {_shown(null)}"
            )
    return ""


@contextmanager
def changed_weights(model: nn.Module, change: Change) -> Iterator[None]:
    """Every parameter replaced by `change(name, parameter)` inside the context, and put back bit for bit after it."""
    kept: dict[str, Tensor] = {}
    try:
        for name, parameter in model.named_parameters():
            kept[name] = parameter.detach().clone()
            parameter.data.copy_(change(name, parameter.detach()))
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.data.copy_(kept[name])


def _both(pair: Pair) -> Iterator[tuple[str, Tensor, Tensor]]:
    theirs = dict(pair.rl.model.named_parameters())
    for name, ours in pair.in_.model.named_parameters():
        yield name, ours.detach(), theirs[name].detach().to(ours.device)


def _shown(interval: Interval) -> str:
    return f"{float(interval.value):.3g} [{float(interval.low):.3g}, {float(interval.high):.3g}]"
