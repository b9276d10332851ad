"""What a recovery must be read beside: the 2x2 that separates now from before, and pairs without a change."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from interp.statistics.distributions import log_probabilities, symmetric_kl
from interp.updates import Realized, as_large, random_update, wide_type

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
    (`RandomUpdate`). Each with the same metric at the same decisions, and (`, own decisions`) at the decisions found
    for itself: a difference that is selected is never 0 on average, whatever made it. For `decisive` those are the
    pair's own first divergences.

    Arguments:
        seed: of the random directions.
        settings: as in `interp.statistics.bootstrap_mean`.

    Returns:
        Intervals; `random`'s say how much of RL's norm the weights hold (`Null`).

    Raises:
        FrankenlensError: the random update is not as large as RL's in the type of the weights.
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
        held = change.held if isinstance(change, RandomUpdate) else None
        for name, values in ((label, after - before), (f"{label}, own decisions", own_before())):
            found[name] = Null.beside(bootstrap_mean(values, **settings), held)
    return found


def null_changes(pair: Pair, seed: int = 0) -> dict[str, tuple[HookedVLM, Change]]:
    """By name, a model of the pair and a change of its weights (for `changed_weights`) from which nothing is learnt.

    `bf16`: RL rounded to bfloat16 (not where it is kept in it already). `random`: IN with a random update as large as
    RL's (`RandomUpdate`).

    Arguments:
        seed: of the random directions.
    """

    def rounded(name: str, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16).to(weight.dtype)

    changes: dict[str, tuple[HookedVLM, Change]] = {
        "bf16": (pair.rl, rounded),
        "random": (pair.in_, RandomUpdate(pair, seed)),
    }
    if pair.rl.model.dtype == torch.bfloat16:
        del changes["bf16"]
    return changes


class RandomUpdate:
    """A `Change` of IN: an update of the norm of RL's in every tensor, in a random direction.

    In half precision it is RL's own update with its entries shuffled, brought to its norm where they round
    (`interp.updates.as_large`).

    Arguments:
        pair: IN and RL.
        seed: of the directions; they are drawn anew each time the change is made to the first parameter.

    Attributes:
        held: what the weights hold of the update, all tensors together.
    """

    def __init__(self, pair: Pair, seed: int) -> None:
        self._theirs = dict(pair.rl.model.named_parameters())
        self._first = next(name for name, _ in pair.in_.model.named_parameters())
        self._seed, self._generator = seed, torch.Generator()
        self.held = Realized()

    def __call__(self, name: str, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if name == self._first:
            self._generator.manual_seed(self._seed)
            self.held = Realized()
        wide = wide_type(weight)
        delta = self._theirs[name].detach().to(weight.device, wide) - weight.to(wide)
        update = random_update(delta, weight.dtype, self._generator)
        new = as_large(weight, update, self._seed + zlib.crc32(name.encode()))
        self.held += Realized.of(weight, new, update, directed=False)
        return new


@dataclass(frozen=True)
class Null(Interval):
    """The denominator of a pair that learnt nothing.

    Attributes:
        held: what weights hold of the random update; None where there is none.
    """

    held: Realized | None = None

    @classmethod
    def beside(cls, interval: Interval, held: Realized | None) -> Null:
        """An interval, and the update that it is of."""
        return cls(interval.value, interval.low, interval.high, interval.n, held)


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
    now = [logits.clone() for _, logits in trace_logits(vlm, traces, batch_size)]

    def difference() -> np.ndarray:
        before = (logits for _, logits in trace_logits(vlm, traces, batch_size))
        both = (map(log_probabilities, some) for some in zip(now, before, strict=True))
        return np.array([float(symmetric_kl(p, q).sum()) for p, q in both])

    return difference


def recovery_refused(decisions: DecisionSet, nulls: Mapping[str, Interval], **settings: Any) -> str:
    """Why no recovery may be printed; `""` if it may.

    A recovery is a share of the denominator, so without a denominator clear of those of pairs without a change, noise
    too would draw a full map.
    """
    own = decisions.denominator(**settings)
    if not np.isfinite([own.low, own.high]).all():
        found = f"{int(own.n)} of {decisions.n_prompts} prompts have the decision {decisions.choice!r}"
        return f"the denominator has no interval ({found}); {decisions.ways_on}"
    if bool(own.includes(0.0)):
        found = f"{int(own.n)} of {decisions.n_prompts} prompts"
        return f"the interval of the denominator, {_shown(own)} of {found}, includes 0; {decisions.ways_on}"
    for name, null in nulls.items():
        # too few examples for an interval: their mean is all there is to compare with
        end = null.value if np.isnan(null.high) else null.high
        if bool(own.low <= end):
            held = null.held if isinstance(null, Null) else None
            size = f", whose update has {held.norm_ratio:.2f} of the norm of RL's" if held else ""
            return (
                f"the denominator, {_shown(own)}, is not above that of a pair that learnt nothing "
                f"({name}), {_shown(null)}{size}"
            )
    return ""


@contextmanager
def changed_weights(model: nn.Module, change: Change) -> Iterator[None]:
    """Every parameter replaced by `change(name, parameter)` inside the context, and put back bit for bit after it.

    Raises:
        FrankenlensError: a `RandomUpdate` that is not as large as it should be in the type of the weights; another task
            or thread uses the model.
    """

    def values() -> Iterator[tuple[Tensor, Tensor]]:
        for name, parameter in model.named_parameters():
            own = parameter.detach()
            yield parameter, like(change(name, own.clone()).to(own))

    with swapped(model, values, "changed weights"):
        if isinstance(change, RandomUpdate):
            dtype = next(model.parameters()).dtype
            change.held.require("the random update beside RL's", dtype)
        yield


def _shown(interval: Interval) -> str:
    return f"{float(interval.value):.3g} [{float(interval.low):.3g}, {float(interval.high):.3g}]"
