"""Clean activations of one hook point by kind of token: their mean, and a random part to draw from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.prompts.roles import ROLES

GENERATED = len(ROLES)
"""Kind of the tokens that follow the prompt; those of the prompt are numbered by their role."""
POOL = 1024  # activations of one kind of token that are kept


class Pool:
    """Clean activations of one hook point, by kind of token; each knows the prompt that it comes from."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._kept: dict[int, Tensor] = {}
        self._prompts: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}

    def add(
        self,
        kind: int,
        activations: Float[Tensor, "token ..."],
        prompts: Int[Tensor, " token"] | None = None,
        keys: Float[Tensor, " token"] | None = None,
    ) -> None:
        """Take in the activations of some tokens of some prompts; without prompts and keys, for their mean alone.

        Those of the smallest keys are kept for `sample`, in the order of their keys: where a token's key is random but
        its own, which are kept depends on neither the order nor the batches in which they come.
        """
        if not len(activations):
            return
        total = activations.detach().double().sum(0).cpu()
        self._sums[kind] = self._sums[kind] + total if kind in self._sums else total
        self._counts[kind] = self._counts.get(kind, 0) + len(activations)
        if prompts is None or keys is None:
            return
        some = keys.cpu().argsort(stable=True)[:POOL]
        kept = activations.detach()[some.to(activations.device)].cpu()
        owners, keys = prompts.cpu()[some], keys.cpu()[some]
        if kind in self._kept:
            kept, owners = torch.cat([self._kept[kind], kept]), torch.cat([self._prompts[kind], owners])
            keys = torch.cat([self._keys[kind], keys])
        some = keys.argsort(stable=True)[:POOL]
        self._kept[kind], self._prompts[kind], self._keys[kind] = kept[some], owners[some], keys[some]

    def mean(self, kinds: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos ..."]:
        """The mean activation of each token's kind; 0 where the kind is negative (padding)."""
        kinds = kinds.cpu()
        out = self._empty(kinds)
        for kind in self._kinds(kinds):
            out[kinds == kind] = (self._sums[kind] / self._counts[kind]).float()
        return out

    def sample(
        self,
        kinds: Int[Tensor, "batch pos"],
        prompts: Int[Tensor, " batch"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "batch pos ..."]:
        """For each token a random activation of its kind from another prompt; 0 where the kind is negative.

        Args:
            kinds: of the tokens.
            prompts: the rows' own prompts, which are not drawn from.
            generators: of each row's draws.

        Raises:
            FrankenlensError: no other prompt has tokens of the kind.
        """
        kinds = kinds.cpu()
        out = self._empty(kinds)
        for kind in self._kinds(kinds):
            for row, own in enumerate(prompts.tolist()):
                here = kinds[row] == kind
                others = torch.nonzero(self._prompts[kind] != own).flatten()
                if here.any() and not len(others):
                    raise FrankenlensError(
                        "resample needs another prompt with tokens of the same kind; give two or more prompts"
                    )
                if here.any():
                    drawn = torch.randint(len(others), (int(here.sum()),), generator=generators[row])
                    out[row, here] = self._kept[kind][others[drawn]].float()
        return out

    def _kinds(self, kinds: Int[Tensor, "batch pos"]) -> list[int]:
        wanted = [kind for kind in kinds.unique().tolist() if kind >= 0]
        if missing := [kind for kind in wanted if kind not in self._sums]:
            names = ", ".join((*ROLES, "generated")[kind] for kind in missing)
            raise FrankenlensError(f"no clean run holds tokens of the kind {names}: there is no mean of them")
        return wanted

    def _empty(self, kinds: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos ..."]:
        return torch.zeros(*kinds.shape, *next(iter(self._sums.values())).shape)
