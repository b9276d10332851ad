"""What a recovery must be read beside: the 2x2 that separates now from before, and pairs without a change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from hooks.swapped import like, swapped
from interp.decision.result import DecisionSet
from interp.decision.traces import next_tokens, trace_logits
from interp.metrics import LogitDifference, evaluate
from interp.pair.pair import Pair
from interp.prompts import Prompt, collate
from interp.statistics import Interval, bootstrap_mean

Change = Callable[[str, Tensor], Tensor]
"""A parameter's name and value to its new value."""
NEEDS_PIXELS_ONCE = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids", "token_type_ids")


@torch.no_grad()
def two_by_two(pair: Pair, decisions: DecisionSet, batch_size: int = 32) -> xr.DataArray:
    """Whose weights decide the token, and whose keys and values of the prefix they read.

    The prefix (all but the last token) is run by one model, the last token by one model on that cache. The diagonal
    is each model as it is; RL's weights on IN's prefix say what RL changed *now*, IN's weights on RL's prefix what it
    changed *before*.

    Returns:
        The metric, dims (weights, prefix, example), coordinates `in` and `rl`.

    Raises:
        FrankenlensError: the choice is `soft`, which has no single decision position.
    """
    if not isinstance(decisions.metric, LogitDifference):
        raise FrankenlensError(
            f"two_by_two needs decisions at one token: choose first or decisive, not {decisions.choice}"
        )
    models = {"in": pair.in_, "rl": pair.rl}
    values = np.full((2, 2, len(decisions)), np.nan)
    for first in range(0, len(decisions), batch_size):
        rows = range(first, min(first + batch_size, len(decisions)))
        batch = collate([decisions.prompts[row] for row in rows], "left")
        metric = decisions.metric.select(rows)
        for column, prefix in enumerate(models.values()):
            for row, weights in enumerate(models.values()):
                logits = _last_logits(prefix, weights, batch.inputs)
                values[row, column, rows] = metric.of_next(logits.float()).cpu().numpy()
    coordinates = {
        "weights": list(models),
        "prefix": list(models),
        "example": [p.example.id for p in decisions.prompts],
    }
    return xr.DataArray(
        values,
        coords=coordinates,
        dims=tuple(coordinates),
        name=decisions.metric.name,
        attrs={"units": decisions.metric.units, "choice": decisions.choice},
    )


def _last_logits(
    prefix: HookedVLM, weights: HookedVLM, inputs: Mapping[str, Tensor]
) -> Float[Tensor, "batch vocab"]:
    """Logits of the last token under `weights`, given the prefix's keys and values under `prefix`."""
    here = {name: tensor.to(prefix.model.device) for name, tensor in inputs.items()}
    positions = position_ids(prefix.model, here)
    images = {name: tensor for name, tensor in here.items() if name not in NEEDS_PIXELS_ONCE}
    before = {
        "input_ids": here["input_ids"][:, :-1],
        "attention_mask": here["attention_mask"][:, :-1],
        "position_ids": positions[..., :-1],
        **images,
    }
    cache = prefix(before, use_cache=True, logits_to_keep=1).past_key_values
    last = {
        "input_ids": here["input_ids"][:, -1:],
        "attention_mask": here["attention_mask"],
        "position_ids": positions[..., -1:],
    }
    last = {name: tensor.to(weights.model.device) for name, tensor in last.items()}
    return weights(last, past_key_values=cache, use_cache=True).logits[:, -1]


def position_ids(model: Any, inputs: Mapping[str, Tensor]) -> Int[Tensor, "*axes batch pos"]:
    """Positions as the model would work them out for the whole prompt.

    Models with multimodal rotary positions (axes: time, height, width) keep an offset between calls; positions given
    explicitly do not depend on it.
    """
    mask = inputs["attention_mask"]
    if "image_grid_thw" in inputs and hasattr(model.model, "get_rope_index"):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return model.model.get_rope_index(**{name: inputs[name] for name in names})[0]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def null_pair_denominator(
    pair: Pair, decisions: DecisionSet, seed: int = 0, batch_size: int = 32, **settings: Any
) -> dict[str, Interval]:
    """The denominator of pairs in which nothing was learnt.

    Two such pairs: `bf16`, RL and RL rounded to bfloat16 (nothing to learn from where RL is kept in it already, so left
    out there); `random`, IN and IN with an update of the same norm as RL's in every tensor, but in a random direction
    (in half precision RL's own update with its entries shuffled: a Gaussian of that norm would mostly round away). Each
    with the same metric at the same decisions, and (`, own decisions`)
    at the decisions found for itself: a difference that is selected is never 0 on average, whatever made it. For
    `decisive` those are the pair's own first divergences.

    Arguments:
        seed: of the random directions.
        settings: as in `interp.statistics.bootstrap_mean`.
    """
    changes = null_changes(pair, seed)
    traces = {"bf16": (decisions.rl_values, decisions.rl_traces)}
    traces["random"] = (decisions.in_values, decisions.in_traces)
    own = _own_soft if decisions.choice == "soft" else _own_first
    found = {}
    for label, (vlm, change) in changes.items():
        before, written = traces[label]
        with changed_weights(vlm.model, change):
            after = evaluate(vlm, decisions.prompts, decisions.metric, batch_size)
            own_before = own(vlm, written, batch_size)
        found[label] = bootstrap_mean(after - before, **settings)
        found[f"{label}, own decisions"] = bootstrap_mean(own_before(), **settings)
    return found


def null_changes(pair: Pair, seed: int = 0) -> dict[str, tuple[HookedVLM, Change]]:
    """By name, a model of the pair and a change of its weights (for `changed_weights`) from which nothing is learnt.

    `bf16`: RL rounded to bfloat16 (not where it is kept in it already). `random`: IN with an update of the same norm as
    RL's in every tensor, but in a random direction; in half precision RL's own update with its entries shuffled.

    Arguments:
        seed: of the random directions; drawn anew each time the change is made to the first parameter.
    """
    updates = {name: theirs.float() - ours.float() for name, ours, theirs in _both(pair)}
    first = next(iter(updates))
    generator = torch.Generator()

    def rounded(name: str, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16).to(weight.dtype)

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
        return (weight.float() + update).to(weight.dtype)

    changes: dict[str, tuple[HookedVLM, Change]] = {"bf16": (pair.rl, rounded), "random": (pair.in_, shifted)}
    if pair.rl.model.dtype == torch.bfloat16:
        del changes["bf16"]
    return changes


def _own_first(vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int) -> Callable[[], np.ndarray]:
    """At the first divergence of the model as it is now from its traces: log odds of the two tokens.

    Returns:
        A function that subtracts the log odds under the weights that the model has when it is called.
    """
    prompts, now, before = [], [], []
    for trace, logits in trace_logits(vlm, traces, batch_size):
        written, chosen = torch.tensor(trace.trace_ids), next_tokens(trace, logits)
        if places := torch.nonzero(chosen != written).flatten().tolist():
            prompts.append(trace.truncated(trace.n_prompt_tokens + places[0]))
            now.append(int(chosen[places[0]]))
            before.append(int(written[places[0]]))
    metric = LogitDifference(torch.tensor(now, dtype=torch.long), torch.tensor(before, dtype=torch.long))
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
        # too few examples for an interval: their mean is all there is to compare with
        end = null.value if np.isnan(null.high) else null.high
        if bool(own.low <= end):
            return (
                f"the denominator, {_shown(own)}, is not above that of a pair that learnt nothing "
                f"({name}), {_shown(null)}"
            )
    return ""


@contextmanager
def changed_weights(model: nn.Module, change: Change) -> Iterator[None]:
    """Every parameter replaced by `change(name, parameter)` inside the context, and put back bit for bit after it."""

    def values() -> Iterator[tuple[Tensor, Tensor]]:
        for name, parameter in model.named_parameters():
            own = parameter.detach()
            yield parameter, like(change(name, own.clone()).to(own))

    with swapped(model, values, "changed weights"):
        yield


def _both(pair: Pair) -> Iterator[tuple[str, Tensor, Tensor]]:
    theirs = dict(pair.rl.model.named_parameters())
    for name, ours in pair.in_.model.named_parameters():
        yield name, ours.detach(), theirs[name].detach().to(ours.device)


def _shown(interval: Interval) -> str:
    return f"{float(interval.value):.3g} [{float(interval.low):.3g}, {float(interval.high):.3g}]"
