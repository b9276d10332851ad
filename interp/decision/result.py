"""What `find_decisions` returns: the decisions, and everything that has to be printed beside a recovery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from hooks.errors import FrankenlensError
from interp.metrics import Metric
from interp.prompts import Prompt
from interp.questions.examples import Example, cluster_of
from interp.statistics import Interval, mean_interval


@dataclass(frozen=True)
class Decision:
    """One place where RL and IN part.

    Attributes:
        row: the prompt, as a row of the `DecisionSet`'s traces.
        prompt: ends at the decision: the position whose next token is decided. For `soft` it holds RL's whole trace.
        index: which token of RL's trace is decided, from 0; None for `soft`.
        rl_token, in_token: what each model chooses there; None for `soft`.
        role: role of RL's token; "" for `soft`.
    """

    row: int
    prompt: Prompt
    index: int | None = None
    rl_token: int | None = None
    in_token: int | None = None
    role: str = ""

    @property
    def example(self) -> Example:
        """The example asked about."""
        return self.prompt.example


@dataclass(frozen=True, eq=False)
class DecisionSet:
    """Decisions of a pair on a set of prompts, the same for both directions of patching.

    Attributes:
        choice: `first`, `decisive` or `soft`.
        decisions: one per prompt that qualifies.
        metric: scores a batch of `prompts`, high where the model does as RL does.
        in_values, rl_values: the metric of the two clean models, one per decision.
        rl_traces, in_traces: every prompt with the greedy trace of each model.
        rl_correct, in_correct: whether those end in the right answer.
        n_diverge: prompts on which the two next tokens differ anywhere along RL's trace.
        excluded: reason -> number of prompts without a decision.
        unparsed: model -> reason -> number of traces that do not parse.
        n_unstable: trace positions left out since RL, run over its own trace at once, would choose another token
            than it did step by step (a tie to rounding), or than its trace has (sampled, of elsewhere).
        given: model -> where its traces are from, of those that were written elsewhere.
    """

    choice: str
    decisions: tuple[Decision, ...]
    metric: Metric
    in_values: Float[np.ndarray, " decision"] = field(repr=False)
    rl_values: Float[np.ndarray, " decision"] = field(repr=False)
    rl_traces: tuple[Prompt, ...] = field(repr=False)
    in_traces: tuple[Prompt, ...] = field(repr=False)
    rl_correct: Bool[np.ndarray, " prompt"] = field(repr=False)
    in_correct: Bool[np.ndarray, " prompt"] = field(repr=False)
    n_diverge: int
    excluded: Mapping[str, int]
    unparsed: Mapping[str, Mapping[str, int]]
    n_unstable: int
    given: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.decisions)

    @property
    def n_prompts(self) -> int:
        """Prompts that were looked at."""
        return len(self.rl_traces)

    @property
    def examples(self) -> tuple[Example, ...]:
        """All that were looked at, with and without a decision."""
        return tuple(trace.example for trace in self.rl_traces)

    @property
    def clusters(self) -> Shaped[np.ndarray, " decision"]:
        """Which decisions hang together (`interp.questions.examples.cluster_of`)."""
        return np.array([cluster_of(decision.example) for decision in self.decisions], dtype=str)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of the decisions, to be collated and patched."""
        return tuple(decision.prompt for decision in self.decisions)

    def having(self, role: str) -> DecisionSet:
        """Those whose prompt has a token of a role before the decision; all have some of "all" and "decision"."""
        if role in ("all", "decision"):
            return self
        rows = [row for row, prompt in enumerate(self.prompts) if role in prompt.roles]
        return replace(
            self,
            decisions=tuple(self.decisions[row] for row in rows),
            metric=self.metric.select(rows),
            in_values=self.in_values[rows],
            rl_values=self.rl_values[rows],
        )

    def denominator(self, **settings: Any) -> Interval:
        """Mean of RL's metric minus IN's over the decisions, in the metric's units, with its interval; by clusters.

        `settings` as in `interp.statistics.mean_interval`.
        """
        return mean_interval(self.rl_values - self.in_values, **{"clusters": self.clusters, **settings})

    @property
    def ways_on(self) -> str:
        """What to try where too few prompts have the decision, in Python and on the command line."""
        others = {
            "decisive": f"first ({self.n_diverge} of {self.n_prompts} have one), or soft, which every prompt has",
            "first": "soft, which every prompt has",
        }
        more = f"give more than {self.n_prompts} examples (--n)"
        if self.choice not in others:
            return more
        return f"{more}, or another choice of decision (--decision): {others[self.choice]}"

    def require_some(self, left_out: Mapping[str, int] | None = None) -> None:
        """Refuse to go on where no prompt has the decision.

        Args:
            left_out: reason to number of prompts; by default why they are not among the decisions.

        Raises:
            FrankenlensError: how many prompts were left out for which reason, and what to try next.
        """
        if len(self):
            return
        why = self.excluded if left_out is None else left_out
        reasons = [f"{n}: {reason}" for reason, n in why.items() if n]
        unparsed = [
            f"{n} of {model.upper()}'s traces do not parse: {fault}"
            for model, faults in self.unparsed.items()
            for fault, n in faults.items()
        ]
        delimiters = " Or the delimiters that the pair writes (--reasoning, --answer)." if unparsed else ""
        raise FrankenlensError(
            f"None of {self.n_prompts} prompts qualifies for the decision {self.choice!r} "
            f"({'; '.join([*reasons, *unparsed])}). To go on, {self.ways_on}.{delimiters}"
        )

    def token_pairs(self, n: int | None = 5) -> list[tuple[str, str, int]]:
        """The commonest pairs (RL's token, IN's token, number of decisions)."""
        pairs = Counter(
            (self._text(d.rl_token), self._text(d.in_token)) for d in self.decisions if d.rl_token is not None
        )
        return [(rl, in_, count) for (rl, in_), count in pairs.most_common(n)]

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.rl_traces[0].builder.decode([token])

    def summary(self, **settings: Any) -> dict[str, Any]:
        """What has to stand beside any recovery, ready for JSON. `settings` as in `denominator`."""
        interval = self.denominator(**settings)
        indices = [d.index for d in self.decisions if d.index is not None]
        return {
            "choice": self.choice,
            "n_prompts": self.n_prompts,
            "n_diverge": self.n_diverge,
            "n_qualify": len(self),
            "excluded": dict(self.excluded),
            "n_in_correct": int(self.in_correct.sum()),
            "n_rl_correct": int(self.rl_correct.sum()),
            "unparsed": {model: dict(reasons) for model, reasons in self.unparsed.items()},
            "n_unstable_positions": self.n_unstable,
            **({"given_traces": dict(self.given)} if self.given else {}),
            "denominator": {key: _number(getattr(interval, key)) for key in ("value", "low", "high", "n")},
            "units": self.metric.units,
            "trace_index": _quartiles(indices),
            "roles": dict(Counter(d.role for d in self.decisions if d.role).most_common()),
            "token_pairs": [{"rl": rl, "in": in_, "n": count} for rl, in_, count in self.token_pairs()],
        }


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _quartiles(indices: Sequence[int]) -> dict[str, float] | None:
    if not indices:
        return None
    names = ("min", "quarter", "median", "three_quarters", "max")
    return {
        name: float(q) for name, q in zip(names, np.percentile(indices, [0, 25, 50, 75, 100]), strict=True)
    }
