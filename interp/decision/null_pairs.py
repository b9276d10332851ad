"""Pairs in which nothing was learnt: what a denominator, and a cell of a map, must lie above."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks import HookedVLM
from hooks.batches import SHARE
from hooks.errors import FrankenlensError
from hooks.memory import NOT_WORTH_ASKING, free_memory, room
from hooks.shared import shared
from hooks.spilled import Spill
from hooks.swapped import like, swapped
from interp.decision.result import DecisionSet
from interp.decision.soft import soft_difference
from interp.decision.traces import Head, StepLogits, next_tokens, trace_logits
from interp.metrics import LogitDifference, Metric, evaluate
from interp.pair.pair import Pair
from interp.prompts import Prompt
from interp.questions.examples import cluster_of
from interp.statistics import MIN_EXAMPLES, Interval, mean_interval
from interp.statistics.distributions import log_probabilities, symmetric_kl
from interp.updates import Realized, as_large, random_update, wide_type

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
    random direction (`RandomUpdate`). Each with the same metric at the same decisions, and (`, own decisions`) at the
    decisions found for itself: a difference that is selected is never 0 on average, whatever made it. For `decisive`
    those are the pair's own first divergences.

    Arguments:
        seed: of the first random direction; the others have those that follow (`random_changes`).
        n_draws: random pairs; the one that reaches highest is given, once for each reading.
        settings: as in `interp.statistics.mean_interval`.

    Returns:
        Intervals; `random`'s say how much of RL's norm the weights hold (`Null`).

    Raises:
        FrankenlensError: n_draws is below 1; a random update is not as large as RL's in the type of the weights.
    """
    if n_draws < 1:
        raise FrankenlensError(f"n_draws is {n_draws}; at least one random pair must stand beside the pair")
    changes = [(name, *one) for name, one in null_changes(pair, seed).items()]
    later = random_changes(pair, range(seed + 1, seed + n_draws))
    changes += [("random", pair.in_, change) for change in later]
    traces = {"bf16": (decisions.rl_values, decisions.rl_traces)}
    traces["random"] = (decisions.in_values, decisions.in_traces)
    own = _own_soft if decisions.choice == "soft" else _own_first

    def measure(number: int) -> dict[str, Null]:
        label, vlm, change = changes[number]
        before, written = traces[label]
        with changed_weights(vlm.model, change):
            after = evaluate(vlm, decisions.prompts, decisions.metric, batch_size)
            asked, own_before = own(vlm, written, batch_size)
        held = change.held if isinstance(change, RandomUpdate) else None
        of = {"clusters": decisions.clusters, **settings}
        new = {label: Null.of(after - before, held, **of)}
        own_of = {"clusters": np.array([cluster_of(p.example) for p in asked]), **settings}
        return new | {f"{label}, own decisions": Null.of(own_before(), held, **own_of)}

    found: dict[str, Interval] = {}
    for _, new in shared("null pairs", range(len(changes)), measure):
        for name, null in new.items():
            if name not in found or not _end(found[name]) >= _end(null):
                found[name] = null
    return found


def _end(null: Interval) -> float:
    """How high it reaches; too few examples for an interval: their mean is all there is to compare with."""
    if isinstance(null, Null) and not np.isnan(null.reach):
        return null.reach
    return float(null.value if np.isnan(null.high) else null.high)


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


def random_changes(pair: Pair, seeds: Sequence[int]) -> list[RandomUpdate]:
    """`RandomUpdate` of each seed."""
    return [RandomUpdate(pair, seed) for seed in seeds]


class RandomUpdate:
    """A `Change` of one of the models: an update of the norm of RL's in every tensor, in a random direction.

    In half precision it is RL's own update with its entries shuffled, brought to its norm where they round
    (`interp.updates.as_large`).

    Arguments:
        pair: IN and RL.
        seed: of the directions; they are drawn anew each time the change is made to the first parameter.

    Attributes:
        held: what the weights hold of the update, all tensors together.
    """

    def __init__(self, pair: Pair, seed: int) -> None:
        self._models = pair.in_.model, pair.rl.model
        self._first = next(name for name, _ in self._models[0].named_parameters())
        self._seed, self._generator = seed, torch.Generator()
        self.held = Realized()

    def __call__(self, name: str, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if name == self._first:
            self._generator.manual_seed(self._seed)
            self.held = Realized()
        wide = wide_type(weight)
        own = [model.get_parameter(name).detach() for model in self._models]
        _require_there(name, own[1])
        ours, theirs = (one.to(weight.device, wide) for one in own)
        update = random_update(theirs - ours, weight.dtype, self._generator)
        new = as_large(weight, update, self._seed + zlib.crc32(name.encode()))
        self.held += Realized.of(weight, new, update, directed=False)
        return new


@dataclass(frozen=True)
class Null(Interval):
    """The denominator of a pair that learnt nothing.

    Attributes:
        held: what weights hold of the random update; None where there is none.
        reach: how high it lies, for the rule that hides recoveries: the upper end of an interval that takes
            `MIN_EXAMPLES`, too few to print one.
    """

    held: Realized | None = None
    reach: float = float("nan")

    @classmethod
    def of(cls, values: Float[np.ndarray, " example"], held: Realized | None, **settings: Any) -> Null:
        """Of values per example; `settings` as in `interp.statistics.mean_interval`."""
        lenient = mean_interval(values, **{**settings, "fewest": MIN_EXAMPLES})
        return cls(**vars(mean_interval(values, **settings)), held=held, reach=_end(lenient))


def own_decisions(
    vlm: HookedVLM,
    before: HookedVLM,
    traces: Sequence[Prompt],
    choice: str,
    batch_size: int,
    most: int | None = None,
) -> tuple[list[Prompt], Metric]:
    """The decisions of a model that was changed, found as those of a pair are: its own, whatever the pair's are.

    Arguments:
        vlm: as it is now.
        before: the model that it was made from.
        traces: what `before` wrote.
        choice: of the pair's decisions. `soft`: everywhere on the traces; else the first divergence from each.
        most: how many are looked for; None: all that there are.

    Returns:
        The prompts that have one, and the metric: now against before.
    """
    if choice != "soft":
        return _first_divergences(vlm, traces, batch_size, most)
    traces = traces[:most]
    return list(traces), soft_difference(vlm, before, traces, batch_size)


def _first_divergences(
    vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int, most: int | None = None
) -> tuple[list[Prompt], LogitDifference]:
    prompts, now, before = [], [], []
    for trace, logits in trace_logits(vlm, traces, batch_size):
        if len(prompts) == most:
            break
        written, chosen = torch.tensor(trace.trace_ids), next_tokens(trace, logits)
        if places := torch.nonzero(chosen != written).flatten().tolist():
            prompts.append(trace.truncated(trace.n_prompt_tokens + places[0]))
            now.append(int(chosen[places[0]]))
            before.append(int(written[places[0]]))
    ids = (torch.tensor(some, dtype=torch.long) for some in (now, before))
    return prompts, LogitDifference(*ids)


def _own_first(
    vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int
) -> tuple[Sequence[Prompt], Callable[[], np.ndarray]]:
    """At the first divergence of the model as it is now from its traces: log odds of the two tokens.

    Returns:
        The prompts that have one, and a function that subtracts the log odds under the weights that the model has when
        it is called.
    """
    prompts, metric = _first_divergences(vlm, traces, batch_size)
    values = evaluate(vlm, prompts, metric, batch_size)
    return prompts, lambda: values - evaluate(vlm, prompts, metric, batch_size)


def _own_soft(
    vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int
) -> tuple[Sequence[Prompt], Callable[[], np.ndarray]]:
    """As `_own_first`, for the soft metric: its denominator is KL(p || q) + KL(q || p), summed over the trace."""
    head, spill = Head.of(vlm), Spill()
    now = [logits.kept(head, spill) for _, logits in trace_logits(vlm, traces, batch_size)]

    def difference() -> np.ndarray:
        before = (logits for _, logits in trace_logits(vlm, traces, batch_size))
        return np.array([_apart(p, q) for p, q in zip(now, before, strict=True)])

    return traces, difference


def _apart(p: StepLogits, q: StepLogits) -> float:
    """The symmetric KL divergence of all steps together."""
    parts = (map(log_probabilities, (p[some], q[some])) for some in q.chunks())
    return sum(float(symmetric_kl(a, b).sum()) for a, b in parts)


def recovery_refused(decisions: DecisionSet, nulls: Mapping[str, Interval], **settings: Any) -> str:
    """Why no recovery may be printed; `""` if it may.

    A recovery is a share of the denominator, so without a denominator clear of those of pairs without a change, noise
    too would draw a full map.
    """
    own = decisions.denominator(**{"fewest": MIN_EXAMPLES, **settings})
    if not np.isfinite([own.low, own.high]).all():
        found = f"{int(own.n)} of {decisions.n_prompts} prompts have the decision {decisions.choice!r}"
        return f"the denominator has no interval ({found}); {decisions.ways_on}"
    if bool(own.includes(0.0)):
        found = f"{int(own.n)} of {decisions.n_prompts} prompts"
        return f"the interval of the denominator, {_shown(own)} of {found}, includes 0; {decisions.ways_on}"
    for name, null in nulls.items():
        if bool(own.low <= _end(null)):
            held = null.held if isinstance(null, Null) else None
            size = f", whose update has {held.norm_ratio:.2f} of the norm of RL's" if held else ""
            return (
                f"the denominator, {_shown(own)}, is not above that of a pair that learnt nothing "
                f"({name}), {_shown(null)}{_reaching(null)}{size}"
            )
    return ""


@contextmanager
def changed_weights(model: nn.Module, change: Change) -> Iterator[None]:
    """Every parameter replaced by `change(name, parameter)` inside the context, and put back bit for bit after it.

    The model's own are kept in memory where there is room for a second model; else tensor by tensor in main memory or a
    temporary file (`hooks.spilled`), so that beside the models there is never more than one tensor.

    Raises:
        FrankenlensError: a `RandomUpdate` that is not as large as it should be in the type of the weights; weights that
            are offloaded; another task or thread uses the model.
    """

    def values() -> Iterator[tuple[Tensor, Tensor]]:
        for name, parameter in model.named_parameters():
            own = parameter.detach()
            _require_there(name, own)
            yield parameter, like(change(name, own.clone()).to(own))

    with swapped(model, values, "changed weights", _spill(model)):
        if isinstance(change, RandomUpdate):
            dtype = next(model.parameters()).dtype
            change.held.require("the random update beside RL's", dtype)
        yield


def _require_there(name: str, weight: Tensor) -> None:
    """Refuses what is brought while it runs: a change of it would change nothing, and there is no update to be seen."""
    if weight.is_meta:
        raise FrankenlensError(
            f"{name} is offloaded, so no other numbers can be put into it (models that learnt nothing); load the "
            'models onto devices that hold them (device_map="auto" with more of them, or a smaller dtype)'
        )


def _has_room(device: torch.device, size: int) -> bool:
    free = room(device) if size >= NOT_WORTH_ASKING else None
    return free is None or size <= SHARE * free


def _spill(model: nn.Module) -> Spill | None:
    """Where the weights of a model are kept that has no room for others beside them; None where it has.

    Half of what is free is taken for them, as for all that is estimated (`hooks.batches`).
    """
    sizes: Counter[torch.device] = Counter()
    for one in model.parameters():
        sizes[one.device] += one.nbytes
    if all(_has_room(device, size) for device, size in sizes.items()):
        return None
    on_host = any(device.type == "cpu" for device in sizes)
    host = None if on_host else free_memory(torch.device("cpu"))
    return Spill(0 if host is None else int(SHARE * host), "the weights of a model that others are put into")


def _shown(interval: Interval) -> str:
    if np.isnan(interval.low):
        return f"{float(interval.value):.3g} [no interval]"
    return f"{float(interval.value):.3g} [{float(interval.low):.3g}, {float(interval.high):.3g}]"


def _reaching(null: Interval) -> str:
    """How high a pair without an interval lies, where that is what refuses."""
    reach = _end(null)
    return f" but up to {reach:.3g}" if np.isnan(null.low) and reach > float(null.value) else ""
