"""What every metric is, and how several are read off a batch: at the tokens that they read, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hooks.batches import at_once
from hooks.errors import FrankenlensError
from interp.metrics.logits import Logits, chunks
from interp.prompts import PromptBatch
from interp.prompts.batch import Rows


@runtime_checkable
class Metric(Protocol):
    """What all metrics share. `units` are those of the values."""

    @property
    def name(self) -> str: ...

    @property
    def units(self) -> str: ...

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]: ...

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]: ...

    def select(self, rows: Rows) -> Metric: ...


@runtime_checkable
class Summed(Protocol):
    """A metric that is a sum over the tokens that it reads; `empty` is its value where it reads none of a prompt."""

    @property
    def empty(self) -> float: ...

    def terms(
        self,
        logits: Float[Tensor, "place vocab"],
        batch: PromptBatch,
        rows: Int[Tensor, " place"],
        columns: Int[Tensor, " place"],
    ) -> Float[Tensor, " place"]: ...


class Reading:
    """Some metrics of one batch. Of those that are sums, the logits of a few tokens exist at one time.

    Attributes:
        reads: what any of them reads.
        columns: those in which a row is read, ascending.
    """

    def __init__(self, metrics: Sequence[Metric], batch: PromptBatch) -> None:
        self._metrics, self._batch = list(metrics), batch
        wanted = torch.stack([metric.reads(batch) for metric in metrics])
        self.reads: Bool[Tensor, "batch pos"] = wanted.any(0)
        self.columns: Int[Tensor, " column"] = self.reads.any(0).nonzero()[:, 0]
        self._summed = [(n, one) for n, one in enumerate(metrics) if isinstance(one, Summed)]
        of_sums = wanted[[n for n, _ in self._summed]]
        places = of_sums.any(0)
        self._rows, self._columns = places.nonzero(as_tuple=True)
        # which of the places each reads; None: all
        mine = [one[places] for one in of_sums]
        self._mine = [None if bool(one.all()) else one for one in mine]
        self._nothing = ~of_sums.any(-1)
        self._any_nothing = bool(self._nothing.any())

    def __call__(self, logits: Logits) -> Float[Tensor, "metric batch"]:
        """The values; they carry gradients where what the logits are made of does."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and logits.source.requires_grad), logits.alone():
            return self._values(logits)

    def _values(self, logits: Logits) -> Float[Tensor, "metric batch"]:
        found: list[Tensor | None] = [None] * len(self._metrics)
        if self._summed:
            for (n, _), values in zip(self._summed, self._sums(logits), strict=True):
                found[n] = values
        if len(self._summed) < len(self._metrics):
            whole, seen = _at_its_columns(logits, self._batch)
            for n, metric in enumerate(self._metrics):
                if found[n] is None:
                    found[n] = _one_a_prompt(metric, metric(whole, seen), len(seen)).to(self._rows.device)
        return torch.stack([one for one in found if one is not None])

    def _sums(self, logits: Logits) -> Float[Tensor, "summed batch"]:
        size = at_once(logits.n_words, logits.source.device)
        sums = torch.zeros(len(self._summed), len(self._batch), device=self._rows.device)
        again = torch.is_grad_enabled() and logits.source.requires_grad and len(self._rows) > size
        for some in chunks(len(self._rows), size):
            if again:  # logits are made again for the gradient, not kept
                sums = sums + checkpoint(self._part, logits, some, use_reentrant=False)
            else:
                sums = sums + self._part(logits, some)
        if self._any_nothing:
            empty = torch.tensor([[one.empty] for _, one in self._summed], device=sums.device)
            sums = torch.where(self._nothing.to(sums.device), empty, sums)
        return sums

    def _part(self, logits: Logits, some: slice) -> Float[Tensor, "summed batch"]:
        """The sums over some places."""
        rows, columns = self._rows[some], self._columns[some]
        made = logits.at(rows, columns)
        sums = []
        for (_, metric), mine in zip(self._summed, self._mine, strict=True):
            kept = slice(None) if mine is None else mine[some]
            own, total = rows[kept], torch.zeros(len(self._batch), device=rows.device)
            if len(own):  # none: of these places, others are read
                terms = metric.terms(made[kept], self._batch, own, columns[kept])
                terms = _one_a_prompt(metric, terms, len(own), "place").to(rows.device)
                total = total.index_add(0, own, terms)
            sums.append(total)
        return torch.stack(sums)


def _one_a_prompt(
    metric: Metric | Summed, found: object, n: int, each: str = "prompt"
) -> Float[Tensor, " n"]:
    """What a metric gave, in float32 at least; one number that stood for all would be taken for each one's own.

    Raises:
        FrankenlensError: it is not a number for each.
    """
    if not isinstance(found, Tensor) or found.shape != (n,) or found.is_complex():
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        what = "value" if each == "prompt" else "terms()"
        raise FrankenlensError(
            f"the {what} of the metric {getattr(metric, 'name', type(metric).__name__)!r} is {shape}; it must be a "
            f"tensor [{n}], one number for each {each}"
        )
    return found if found.dtype == torch.float64 else found.float()


def _at_its_columns(
    logits: Logits, batch: PromptBatch
) -> tuple[Float[Tensor, "batch pos vocab"], PromptBatch]:
    """All of the logits from the first column that is known on, and the batch of these columns.

    What is not known is not a number: a metric that looked at it would show it.
    """
    nothing = batch.roles.shape[1] - 1  # where nothing is read, one column stands for it
    first, made = int(logits.columns[0]) if len(logits.columns) else nothing, logits.tensor()
    names = [name for name, tensor in batch.inputs.items() if tensor.shape[:2] == batch.roles.shape]
    inputs = batch.inputs | {name: batch.inputs[name][:, first:] for name in names}
    seen = replace(batch, inputs=inputs, roles=batch.roles[:, first:], cut=batch.cut + first)
    width = seen.roles.shape[1]
    if made.shape[1] == width:
        return made, seen
    whole = made.new_full((len(made), width, made.shape[-1]), torch.nan)
    whole[:, (logits.columns - first).to(made.device)] = made
    return whole, seen
