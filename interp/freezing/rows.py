"""Rows or columns of a parameter that keep their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from interp.freezing.fingerprint import casts, same_bits

AXES = ("rows", "columns")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows (dim 0) or columns (dim 1) of one parameter, and the values that they keep."""

    dim: int
    index: Int[Tensor, " row"]
    others: Int[Tensor, " other"]
    kept: Shaped[Tensor, "..."]

    def zeroed(self, gradient: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The gradient with these rows 0."""
        return gradient.clone().index_fill_(self.dim, self.index.to(gradient.device), 0)

    def of(self, parameter: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """A copy of these rows."""
        return parameter.detach().index_select(self.dim, self.index.to(parameter.device))

    def rest(self, parameter: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """A copy of the other rows."""
        return parameter.detach().index_select(self.dim, self.others.to(parameter.device))

    def are_in(self, parameter: Shaped[Tensor, "..."]) -> bool:
        """Whether a parameter has the kept values, in its own type."""
        own = self.of(parameter)
        return same_bits(own, self.kept.to(own))

    def are_cast_to(self, parameter: Shaped[Tensor, "..."]) -> bool:
        """Whether a parameter has what casts make of the kept values."""
        own = self.of(parameter)
        return any(same_bits(own, one) for one in casts(self.kept, own))

    def put_back(self, parameter: Shaped[Tensor, "..."]) -> None:
        """Write the kept values into the parameter."""
        kept = self.kept.to(parameter)
        parameter.detach().index_copy_(self.dim, self.index.to(parameter.device), kept)

    def __str__(self) -> str:
        runs = _runs(self.index.tolist())
        return f"{AXES[self.dim]} {', '.join(f'{a}-{b}' if b > a else str(a) for a, b in runs)}"


def rows_of(parameter: Shaped[Tensor, "..."], places: Sequence[tuple[int | None, range]]) -> Rows | None:
    """The union of slices; None where it is the whole parameter."""
    if any(dim is None for dim, _ in places):
        return None
    (dim,) = {dim for dim, _ in places if dim is not None}
    chosen = torch.zeros(parameter.shape[dim], dtype=torch.bool)
    for _, some in places:
        chosen[some.start : some.stop] = True
    if chosen.all():
        return None
    index, others = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
    kept = parameter.detach().index_select(dim, index.to(parameter.device))
    return Rows(dim, index, others, kept)


def trained_part(parameter: Shaped[Tensor, "..."], own: Rows | None) -> Shaped[Tensor, "..."]:
    return parameter if own is None else own.rest(parameter)


def _runs(index: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i in index:
        if runs and i == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return runs
