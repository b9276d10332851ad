"""How far a model follows traces that it is said to have written: the share of their tokens that it would choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hooks import HookedVLM
from interp.decision.traces import next_tokens, trace_logits
from interp.prompts import Prompt

LEAST = 0.5
"""Share of tokens below which traces are taken to be another model's: sampled at temperature 1 a model's own text has
70 to 95 % of its first choices, unrelated text less than 40 %."""


@dataclass(frozen=True)
class Followed:
    """What a model would have chosen along traces.

    Attributes:
        n_tokens: of all traces.
        n_chosen: of those, that are the model's own first choice after what stands before them.
        n_greedy: traces all of whose tokens are.
        n_traces: how many there are.
    """

    n_tokens: int
    n_chosen: int
    n_greedy: int
    n_traces: int

    @property
    def share(self) -> float:
        """Of the tokens; NaN of none."""
        return self.n_chosen / self.n_tokens if self.n_tokens else float("nan")

    def __str__(self) -> str:
        others = "" if self.n_greedy == self.n_traces else ", the others were sampled or are not its own"
        return (
            f"{self.share:.1%} of their {self.n_tokens:,} tokens are the model's first choice; {self.n_greedy} of "
            f"{self.n_traces} are greedy throughout{others}"
        )


@torch.no_grad()
def followed(
    vlm: HookedVLM, traces: Sequence[Prompt], batch_size: int = 32, progress: bool = False
) -> Followed:
    """Run a model along traces and count the tokens that it would have chosen.

    Special tokens that no answer holds are never its choice, as in `interp.pair.generation.greedy`.
    """
    n_tokens = n_chosen = n_greedy = 0
    for trace, logits in trace_logits(vlm, traces, batch_size, progress):
        same = next_tokens(trace, logits) == torch.tensor(trace.trace_ids)
        n_tokens, n_chosen = n_tokens + len(same), n_chosen + int(same.sum())
        n_greedy += bool(same.all())
    return Followed(n_tokens, n_chosen, n_greedy, len(traces))
