"""From logits to one number per prompt.

Every metric is a frozen callable `metric(logits, batch)`. Positions count from a row's first real token, so a metric
holds for any padding; `select(rows)` is the metric of a subset of the prompts it was made for.
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
from hooks.errors import FrankenlensError
from interp.prompts import Prompt, PromptBatch, collate
from interp.statistics import distributions

Rows = Sequence[int] | Int[Tensor, " n"]


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

    @property
    def n_rows(self) -> int:
        """How many prompts it was made for."""
        return len(self.a)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        _require_rows(self.name, len(self.a), batch)
        return self.of_next(_at(logits, batch, self.position))

    def of_next(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
        """The metric where the logits of the position are already picked."""
        rows = torch.arange(len(logits), device=logits.device)
        logits = logits.float()
        return logits[rows, self.a.to(logits.device)] - logits[rows, self.b.to(logits.device)]

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        return _single(batch, self.position)

    def select(self, rows: Rows) -> LogitDifference:
        """The metric of some of the prompts."""
        chosen = torch.tensor([int(row) for row in rows], dtype=torch.long)
        return LogitDifference(
            self.a[chosen], self.b[chosen], None if self.position is None else self.position[chosen]
        )


@dataclass(frozen=True, eq=False)
class SoftDifference:
    """sum_t sum_v weights(t, v) * logit(t, v), with weights p_donor - p_recipient fixed from the clean runs.

    The weights of a position sum to 0, so adding a constant to its logits changes nothing. They take 4 bytes x prompts
    x steps x vocabulary: 120 MB for 10 prompts of 20 tokens each with 150,000 tokens to choose from.

    Attributes:
        weights: one [step, vocab] tensor per prompt.
        start: position that step 0 of each prompt belongs to.
    """

    weights: tuple[Float[Tensor, "_ vocab"], ...]
    start: Int[Tensor, " n"]
    name: str = field(default="soft difference", init=False)
    units: str = field(default="nats", init=False)

    @property
    def n_rows(self) -> int:
        """How many prompts it was made for."""
        return len(self.weights)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        _require_rows(self.name, len(self.weights), batch)
        first = batch.columns(self.start.to(batch.lengths.device)).tolist()
        steps = [
            logits[row, column : column + len(w)]
            for row, (column, w) in enumerate(zip(first, self.weights, strict=True))
        ]
        return torch.stack(
            [(s.float() * w.to(s.device)).sum() for s, w in zip(steps, self.weights, strict=True)]
        )

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        first = batch.columns(self.start.to(batch.lengths.device))[:, None]
        steps = torch.tensor([len(w) for w in self.weights], device=first.device)[:, None]
        columns = torch.arange(batch.roles.shape[1], device=first.device)
        return (columns >= first) & (columns < first + steps)

    def select(self, rows: Rows) -> SoftDifference:
        """The metric of some of the prompts."""
        chosen = [int(row) for row in rows]
        return SoftDifference(tuple(self.weights[row] for row in chosen), self.start[chosen])


@dataclass(frozen=True)
class TraceLogLikelihood:
    """Log-probability of all tokens of the trace; 0 for a prompt without one."""

    name: str = field(default="trace log-likelihood", init=False)
    units: str = field(default="nats", init=False)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        return _log_probability(logits, batch, _trace(batch))

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        return _trace(batch).roll(-1, dims=1)

    def select(self, rows: Rows) -> TraceLogLikelihood:
        """The same metric: it holds nothing of single prompts."""
        return self


@dataclass(frozen=True)
class AnswerLogProbability:
    """Log-probability of the tokens with the role `answer`; NaN for a prompt without any."""

    name: str = field(default="answer log-probability", init=False)
    units: str = field(default="nats", init=False)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        answer = batch.mask("answer").to(logits.device)
        return _log_probability(logits, batch, answer).masked_fill(~answer.any(dim=1), torch.nan)

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        return batch.mask("answer").roll(-1, dims=1)

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

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "batch pos vocab"],
        batch: PromptBatch,
        position: Int[Tensor, " batch"] | None = None,
    ) -> KLToReference:
        """The reference is the distribution of these logits."""
        return cls(distributions.log_probabilities(_at(logits, batch, position).detach()), position)

    @property
    def n_rows(self) -> int:
        """How many prompts it was made for."""
        return len(self.reference)

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        _require_rows(self.name, len(self.reference), batch)
        model, reference = map(
            distributions.log_probabilities, (_at(logits, batch, self.position), self.reference)
        )
        return distributions.kl(reference.to(model), model).to(logits.device, torch.float32)

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        """The positions whose next token the metric looks at."""
        return _single(batch, self.position)

    def select(self, rows: Rows) -> KLToReference:
        """The metric of some of the prompts."""
        chosen = torch.tensor([int(row) for row in rows], dtype=torch.long)
        return KLToReference(self.reference[chosen], None if self.position is None else self.position[chosen])


def _require_rows(name: str, n: int, batch: PromptBatch) -> None:
    if n != len(batch):
        raise FrankenlensError(
            f"the metric {name!r} was made for {n} prompts, the batch has {len(batch)}; score a part with "
            "metric.select(rows) and batch.select(rows)"
        )


def _at(
    logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch, position: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch vocab"]:
    tokens = batch.lengths - 1 if position is None else position.to(batch.lengths.device)
    return logits[torch.arange(len(batch), device=logits.device), batch.columns(tokens).to(logits.device)]


def _single(batch: PromptBatch, position: Int[Tensor, " batch"] | None) -> Bool[Tensor, "batch pos"]:
    if position is None:
        return batch.mask("decision")
    columns = torch.arange(batch.roles.shape[1], device=batch.roles.device)
    return columns[None] == batch.columns(position.to(batch.lengths.device))[:, None]


def _trace(batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
    """The tokens of each row's trace."""
    starts = torch.tensor([prompt.n_prompt_tokens for prompt in batch.prompts], device=batch.lengths.device)
    columns = torch.arange(batch.roles.shape[1], device=batch.roles.device)
    first, last = batch.columns(starts)[:, None], batch.columns(batch.lengths - 1)[:, None]
    return (columns >= first) & (columns <= last)


def _log_probability(
    logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch, wanted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Sum of the log-probabilities of the wanted tokens, each given those before it."""
    ids = batch.inputs["input_ids"].to(logits.device)
    before, token = logits[:, :-1].float(), ids[:, 1:, None]
    log_p = before.gather(-1, token).squeeze(-1) - before.logsumexp(dim=-1)
    return log_p.masked_fill(~wanted[:, 1:].to(logits.device), 0.0).sum(dim=1)


@torch.no_grad()
def evaluate(
    vlm: HookedVLM, prompts: Sequence[Prompt], metric: Metric, batch_size: int = 32
) -> Float[np.ndarray, " prompt"]:
    """The metric of a model as it is, for each prompt."""
    values = np.full(len(prompts), np.nan)
    for first in range(0, len(prompts), batch_size):
        rows = range(first, min(first + batch_size, len(prompts)))
        batch = collate([prompts[row] for row in rows], "left").to(vlm.model.device)
        part = metric.select(rows)
        if isinstance(part, LogitDifference) and part.position is None:
            logits = vlm(batch.inputs, logits_to_keep=1).logits
            scored = part.of_next(logits[:, -1].float())
        else:
            scored = part(vlm(batch.inputs).logits.float(), batch)
        values[first : first + len(rows)] = scored.cpu().numpy()
    return values
