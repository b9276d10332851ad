"""Clean activations of one hook point by kind of token: their mean, and a random part to draw from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.roles import ROLES

GENERATED = len(ROLES)
"""Kind of the tokens that follow the prompt; those of the prompt are numbered by their role."""
POOL = 1024  # activations of one kind of token that are kept


class Pool:
    """Clean activations of one hook point, by kind of token."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._kept: dict[int, Tensor] = {}

    def add(self, kind: int, activations: Float[Tensor, "token ..."], generator: torch.Generator) -> None:
        """Take in the activations of some tokens; of those kept for `sample`, a random part."""
        if not len(activations):
            return
        total = activations.double().sum(0)
        self._sums[kind] = self._sums[kind] + total if kind in self._sums else total
        self._counts[kind] = self._counts.get(kind, 0) + len(activations)
        some = activations[torch.randperm(len(activations), generator=generator)[: POOL // 4]].cpu()
        old = self._kept.get(kind)
        joined = some if old is None else torch.cat([old, some])
        self._kept[kind] = joined[torch.randperm(len(joined), generator=generator)[:POOL]]

    def mean(self, kinds: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos ..."]:
        """The mean activation of each token's kind."""
        return self._lookup(kinds, lambda kind, n: (self._sums[kind] / self._counts[kind]).float()[None])

    def sample(
        self, kinds: Int[Tensor, "batch pos"], generator: torch.Generator
    ) -> Float[Tensor, "batch pos ..."]:
        """A random activation of each token's kind."""

        def draw(kind: int, n: int) -> Tensor:
            pool = self._kept[kind]
            return pool[torch.randint(len(pool), (n,), generator=generator)].float()

        return self._lookup(kinds, draw)

    def _lookup(
        self, kinds: Int[Tensor, "batch pos"], take: Callable[[int, int], Tensor]
    ) -> Float[Tensor, "batch pos ..."]:
        kinds = kinds.cpu()
        example = next(iter(self._sums.values()))
        out = torch.zeros(*kinds.shape, *example.shape)
        for kind in kinds.unique().tolist():
            here = kinds == kind
            # a kind that no clean run holds (padding): the first there is
            known = kind if kind in self._sums else next(iter(self._sums))
            out[here] = take(known, int(here.sum())).cpu()
        return out
