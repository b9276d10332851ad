"""How the next token is chosen: the arg max, or a seeded draw that does not depend on who else is in the batch."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from hooks import FrankenlensError
from interp.prompts import Prompt


@dataclass(frozen=True)
class Sampling:
    """A random draw of every token; two runs with one seed share their draws, row by row and step by step.

    Attributes:
        temperature: above 0.
        top_p: of the probability, the share that is drawn from.
        seed: with the example's id, of a row's draws.

    Raises:
        FrankenlensError: a value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise FrankenlensError(
                f"{self}: temperature is above 0 (sampling=None is greedy), top_p in (0, 1], the seed not negative"
            )


class Chooser:
    """Chooses the next token of every row of a list of prompts.

    Args:
        prompts: all of them; rows are numbered in this order.
        sampling: None for the arg max.
        steps: the most tokens that are written.
    """

    def __init__(self, prompts: Sequence[Prompt], sampling: Sampling | None, steps: int) -> None:
        self._suppressed = torch.tensor(prompts[0].builder.suppressed_ids, dtype=torch.long)
        self._sampling = sampling
        if sampling is None:
            return
        self._warpers = TemperatureLogitsWarper(float(sampling.temperature)), TopPLogitsWarper(sampling.top_p)
        seen: Counter[str] = Counter()
        draws = []
        for prompt in prompts:
            name = prompt.example.id
            key = [sampling.seed, zlib.crc32(name.encode()), seen[name]]
            draws.append(np.random.default_rng(key).random(steps))
            seen[name] += 1
        self._uniform = torch.from_numpy(np.stack(draws))

    def arg_max(self, logits: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
        """The likeliest token that may be written."""
        return self._allowed(logits).argmax(-1)

    def choose(
        self, logits: Float[Tensor, "row vocab"], rows: Sequence[int], step: int
    ) -> Int[Tensor, " row"]:
        """The next token of these rows at this step."""
        allowed = self._allowed(logits)
        if self._sampling is None:
            return allowed.argmax(-1)
        ids: Tensor = torch.empty(len(rows), 0, dtype=torch.long)
        for warp in self._warpers:
            allowed = warp(ids, allowed)  # type: ignore[arg-type]
        cumulative = allowed.double().softmax(-1).cumsum(-1)
        draw = self._uniform[list(rows), step].to(cumulative.device)
        # the first token whose cumulative probability exceeds the draw, which is therefore not 0 itself
        return torch.searchsorted(cumulative, (draw * cumulative[:, -1])[:, None], right=True)[:, 0]

    def _allowed(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        return logits.index_fill(-1, self._suppressed.to(logits.device), -torch.inf)
