"""From logits to one number per prompt.

Every metric is a frozen callable `metric(logits, batch)`. Positions count from a row's first real token, so a metric
holds for any padding; `select(rows)` is the metric of a subset of the prompts it was made for. Those here are sums of
`terms`, one a token that they read, so that no more logits exist at one time than a device has room for (`Reading`); a
metric of your own without `terms` is given the logits of all columns that it reads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks import HookedVLM
from hooks.batches import fitting, forward_bytes, in_shared_parts, logits_bytes
from hooks.errors import FrankenlensError
from interp.metrics.logits import Logits, run_for_logits
from interp.metrics.reading import Metric, Reading, Rows
from interp.prompts import Prompt, PromptBatch, collate
from interp.prompts.batch import numbers_of
from interp.statistics import distributions


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """logit(a) - logit(b) of the next token: the log odds of a over b.

    Attributes:
        a, b: token ids, one per prompt.
        position: the position whose next token is meant; None: each prompt's last.

    Example:
        >>> metric = fl.LogitDifference(a=torch.tensor([2]), b=torch.tensor([0]))
        >>> metric.of_next(torch.tensor([[1.0, 0.0, 3.5]]))
        tensor([2.5000])
    """

    a: Int[Tensor, " n"]
    b: Int[Tensor, " n"]
    position: Int[Tensor, " n"] | None = None
    name: str = field(default="logit difference", init=False)
    units: str = field(default="nats", init=False)
    empty: float = field(default=float("nan"), init=False)

    def __post_init__(self) -> None:
        sizes = {len(one) for one in (self.a, self.b, self.position) if one is not None}
        if len(sizes) > 1 or any(bool((ids < 0).any()) for ids in (self.a, self.b)):
            raise FrankenlensError(
                f"the logit difference of {self.a.tolist()} and {self.b.tolist()}: give two token ids for each prompt, "
                "none below 0 (a word that the tokenizer does not have?)"
            )

    @property
    def n_rows(self) -> int:
        """How many prompts it was made for."""
        return len(self.a)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        _require_rows(self.name, len(self.a), batch)
        return Reading([self], batch)(Logits.made(logits))[0]

    def terms(
        self,
        logits: Float[Tensor, "place vocab"],
        batch: PromptBatch,
        rows: Int[Tensor, " place"],
        columns: Int[Tensor, " place"],
    ) -> Float[Tensor, " place"]:
        """One for each prompt."""
        return _difference(
            logits, *(ids.to(logits.device)[rows.to(logits.device)] for ids in (self.a, self.b))
        )

    def of_next(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        """The metric where the logits of the position are already picked."""
        return _difference(logits.float(), self.a.to(logits.device), self.b.to(logits.device))

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        return _single(batch, self.position)

    def select(self, rows: Rows) -> LogitDifference:
        """The metric of some of the prompts."""
        chosen = torch.tensor(numbers_of(rows), dtype=torch.long)
        return LogitDifference(
            self.a[chosen], self.b[chosen], None if self.position is None else self.position[chosen]
        )


HELD = 2**24
"""Weights that some prompts together hold once they are made: 64 MiB."""


@runtime_checkable
class Shift(Protocol):
    """Weights [step vocab] of a prompt, made some steps at a time (`interp.decision.soft`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, steps: slice, /) -> Float[Tensor, "_ vocab"]: ...

    def held(self, most: int) -> Shift:
        """One that makes its weights once, where they are no more than that."""
        ...


@dataclass(frozen=True, eq=False)
class SoftDifference:
    """sum_t sum_v weights(t, v) * logit(t, v), with weights p_donor - p_recipient fixed from the clean runs.

    The weights of a position sum to 0, so adding a constant to its logits changes nothing. As tensors they take 4 bytes
    x steps x vocabulary a prompt, 120 MB for 10 prompts of 20 tokens with 150,000 words; decisions that are found keep
    what they are made of instead where that is less (`interp.decision.soft`).

    Attributes:
        weights: [step vocab] per prompt.
        start: position that step 0 of each prompt belongs to.
    """

    weights: tuple[Float[Tensor, "_ vocab"] | Shift, ...]
    start: Int[Tensor, " n"]
    name: str = field(default="soft difference", init=False)
    units: str = field(default="nats", init=False)
    empty: float = field(default=0.0, init=False)

    @property
    def n_rows(self) -> int:
        """How many prompts it was made for."""
        return len(self.weights)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        _require_rows(self.name, len(self.weights), batch)
        return Reading([self], batch)(Logits.made(logits))[0]

    def terms(
        self,
        logits: Float[Tensor, "place vocab"],
        batch: PromptBatch,
        rows: Int[Tensor, " place"],
        columns: Int[Tensor, " place"],
    ) -> Float[Tensor, " place"]:
        """sum_v weights(t, v) * logit(t, v) of each step t; a prompt's steps follow one another."""
        steps = columns - batch.columns(self.start.to(batch.lengths.device)).to(columns.device)[rows]
        found, counts = rows.unique_consecutive(return_counts=True)
        weights = [
            self.weights[row][int(some[0]) : int(some[-1]) + 1].to(logits.device, logits.dtype)
            for row, some in zip(found.tolist(), steps.split(counts.tolist()), strict=True)
        ]
        return (logits * torch.cat(weights)).sum(-1)

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        start = self.start.to(batch.lengths.device)
        steps = torch.tensor([len(w) for w in self.weights], device=start.device)
        _require_tokens("the soft difference's step at position", start, start + steps - 1, batch)
        first, steps = batch.columns(start)[:, None], steps[:, None]
        columns = torch.arange(batch.roles.shape[1], device=first.device)
        return (columns >= first) & (columns < first + steps)

    def select(self, rows: Rows) -> SoftDifference:
        """The metric of some of the prompts."""
        chosen = numbers_of(rows)
        most = HELD // max(1, len(chosen))
        weights = (self.weights[row] for row in chosen)
        held = tuple(one if isinstance(one, Tensor) else one.held(most) for one in weights)
        return SoftDifference(held, self.start[chosen])


@dataclass(frozen=True)
class TraceLogLikelihood:
    """Log-probability of all tokens of the trace; 0 for a prompt without one."""

    name: str = field(default="trace log-likelihood", init=False)
    units: str = field(default="nats", init=False)
    empty: float = field(default=0.0, init=False)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        return Reading([self], batch)(Logits.made(logits))[0]

    def terms(
        self,
        logits: Float[Tensor, "place vocab"],
        batch: PromptBatch,
        rows: Int[Tensor, " place"],
        columns: Int[Tensor, " place"],
    ) -> Float[Tensor, " place"]:
        """The log-probability of each token."""
        return _log_probability(logits, batch, rows, columns)

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        return _before(_trace(batch))

    def select(self, rows: Rows) -> TraceLogLikelihood:
        """The same metric: it holds nothing of single prompts."""
        return self


@dataclass(frozen=True)
class AnswerLogProbability:
    """Log-probability of the tokens with the role `answer`; NaN for a prompt without any."""

    name: str = field(default="answer log-probability", init=False)
    units: str = field(default="nats", init=False)
    empty: float = field(default=float("nan"), init=False)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        return Reading([self], batch)(Logits.made(logits))[0]

    def terms(
        self,
        logits: Float[Tensor, "place vocab"],
        batch: PromptBatch,
        rows: Int[Tensor, " place"],
        columns: Int[Tensor, " place"],
    ) -> Float[Tensor, " place"]:
        """The log-probability of each token."""
        return _log_probability(logits, batch, rows, columns)

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        return _before(batch.mask("answer"))

    def select(self, rows: Rows) -> AnswerLogProbability:
        """The same metric: it holds nothing of single prompts."""
        return self


@dataclass(frozen=True, eq=False)
class KLToReference:
    """KL(reference || model) of the next token's distribution, worked out in float64; never below 0.

    Attributes:
        reference: log-probabilities, one row per prompt.
        position: the position whose next token is meant; None: each prompt's last.
    """

    reference: Float[Tensor, "n vocab"]
    position: Int[Tensor, " n"] | None = None
    name: str = field(default="KL to reference", init=False)
    units: str = field(default="nats", init=False)
    empty: float = field(default=float("nan"), init=False)

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "batch pos vocab"],
        batch: PromptBatch,
        position: Int[Tensor, " batch"] | None = None,
    ) -> KLToReference:
        """The reference is the distribution of these logits."""
        tokens = batch.lengths - 1 if position is None else position.to(batch.lengths.device)
        rows, columns = (some.to(logits.device) for some in (torch.arange(len(batch)), batch.columns(tokens)))
        return cls(distributions.log_probabilities(logits[rows, columns].detach()), position)

    @property
    def n_rows(self) -> int:
        """How many prompts it was made for."""
        return len(self.reference)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        _require_rows(self.name, len(self.reference), batch)
        return Reading([self], batch)(Logits.made(logits))[0]

    def terms(
        self,
        logits: Float[Tensor, "place vocab"],
        batch: PromptBatch,
        rows: Int[Tensor, " place"],
        columns: Int[Tensor, " place"],
    ) -> Float[Tensor, " place"]:
        """One for each prompt."""
        reference = self.reference[rows.to(self.reference.device)]
        model, given = map(distributions.log_probabilities, (logits, reference))
        return distributions.kl(given.to(model), model).to(logits.device, torch.float32)

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        return _single(batch, self.position)

    def select(self, rows: Rows) -> KLToReference:
        """The metric of some of the prompts."""
        chosen = torch.tensor(numbers_of(rows), dtype=torch.long)
        return KLToReference(self.reference[chosen], None if self.position is None else self.position[chosen])


def _require_rows(name: str, n: int, batch: PromptBatch) -> None:
    if n != len(batch):
        raise FrankenlensError(
            f"the metric {name!r} was made for {n} prompts, the batch has {len(batch)}; score a part with "
            "metric.select(rows) and batch.select(rows)"
        )


def _single(batch: PromptBatch, position: Int[Tensor, " batch"] | None) -> Bool[Tensor, "batch pos"]:
    if position is None:
        return batch.mask("decision")
    position = position.to(batch.lengths.device)
    _require_tokens("position", position, position, batch)
    columns = torch.arange(batch.roles.shape[1], device=batch.roles.device)
    return columns[None] == batch.columns(position)[:, None]


def _require_tokens(
    what: str, first: Int[Tensor, " batch"], last: Int[Tensor, " batch"], batch: PromptBatch
) -> None:
    """Positions count from a prompt's first token; others would be read off padding, or not at all."""
    if bool((outside := (last >= first) & ((first < 0) | (last >= batch.lengths))).any()):
        row = int(outside.nonzero()[0, 0])
        given = int(first[row]) if first[row] < 0 else int(last[row])
        raise FrankenlensError(
            f"{what} {given} of prompt {batch.prompts[row].example.id!r} is none of its {int(batch.lengths[row])} "
            "tokens, which count from 0; give the metric the prompts it was made for"
        )


def _trace(batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
    """The tokens of each row's trace."""
    starts = torch.tensor([prompt.n_prompt_tokens for prompt in batch.prompts], device=batch.lengths.device)
    columns = torch.arange(batch.roles.shape[1], device=batch.roles.device)
    first, last = batch.columns(starts)[:, None], batch.columns(batch.lengths - 1)[:, None]
    return (columns >= first) & (columns <= last)


def _difference(
    logits: Float[Tensor, "n vocab"], a: Int[Tensor, " n"], b: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, a] - logits[rows, b]


def _before(tokens: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The position before each of these tokens, whose next token it is."""
    found = tokens.roll(-1, dims=1)
    found[:, -1] = False
    return found


def _log_probability(
    logits: Float[Tensor, "place vocab"],
    batch: PromptBatch,
    rows: Int[Tensor, " place"],
    columns: Int[Tensor, " place"],
) -> Float[Tensor, " place"]:
    """Log-probability of the token that follows each place."""
    ids = batch.inputs["input_ids"]
    token = ids[rows.to(ids.device), columns.to(ids.device) + 1].to(logits.device)
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)


@torch.no_grad()
def evaluate(
    vlm: HookedVLM, prompts: Sequence[Prompt], metric: Metric, batch_size: int = 32
) -> Float[np.ndarray, " prompt"]:
    """The metric of a model as it is, for each prompt."""
    values = np.full(len(prompts), np.nan)
    if not prompts:
        return values
    width = max(map(len, prompts))

    def score(rows: Sequence[int]) -> Float[np.ndarray, " row"]:
        batch = collate([prompts[row] for row in rows], "left").to(vlm.device)
        reading = Reading([metric.select(rows)], batch)
        return reading(run_for_logits(vlm, batch.inputs, reading.columns))[0].cpu().numpy()

    of_row, whole = forward_bytes(vlm, width), logits_bytes(vlm, width)
    size = fitting(vlm, batch_size, of_row, "reading a metric", whole)
    for rows, scored in in_shared_parts("reading a metric", range(len(prompts)), size, score):
        values[list(rows)] = scored
    return values
