"""The kinds of planted pairs: what is changed where, drawn from a seed of its own for every pair."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hooks import FrankenlensError, HookedVLM
from interp.map.components import Component
from interp.planting.methods import relative_norm
from interp.planting.plants import DECODER, EVERYWHERE, WITH_EXPERTS, Plant, candidates, draw
from interp.planting.wired import WIRED, wired_names
from interp.regions import NAMES, thirds

KINDS: Mapping[str, str] = {
    "rl": "heads and MLPs with RL's weights",
    "random": "heads and MLPs with a random update of RL's norm",
    "rotated": "heads and MLPs turned at random, at the norm of their weights",
    "decoys": "as rl, beside as many MLPs whose neurons are permuted, which changes nothing but weights",
    "supervised": "heads and MLPs trained by supervision, everything else frozen",
    "reinforced": "heads and MLPs trained by RL, everything else frozen",
    "layer": "all heads and the MLP of one layer with RL's weights",
    "region": "Early, Mid or Late with RL's weights",
    "vision": "a vision block with RL's weights",
    "identical": "nothing",
    "bf16": "nothing but IN rounded to bfloat16",
    "noise": "nothing but noise of the size of that rounding",
    "projector": "the projector with RL's weights",
    "named": "the components that are named",
    "experts": "experts with RL's weights",
    "tower": "the whole vision tower with RL's weights",
    "query-key": "queries and keys of one group of heads with RL's weights",
    "joint": "two MLPs that do something only together",
    "cancelling": "values and output matrices of one group of heads, whose changes cancel",
    "backup": "an MLP, and the next layer's, which writes as much where the first does not",
}
"""In an order that seeds depend on: a new kind comes last."""
NULLS = {"identical": "none", "bf16": "bf16", "noise": "gaussian"}
"""Kinds in which nothing was changed, to the noise of their weights."""
TRAINED = ("supervised", "reinforced")
"""Kinds whose donor is trained, with everything but the plant frozen."""
DRAWN = ("rl", "random", "rotated", "decoys", *TRAINED, "experts")
"""Kinds whose components are drawn one by one."""
VISIBILITY = "visibility"
"""Noise pairs that say from where on a plant can be seen."""
MOST = 1000
"""Pairs of a kind that have seeds of their own."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Which plant the i-th pair of a kind has.

    Attributes:
        in_, donor: what is planted into, and what from.
        changed: components that change, where they are drawn one by one.
        named, change: of the kind "named": addresses, and how they change (`Plant.change`).
        seed: of everything; kinds and pairs have seeds that differ, and do not move when others are left out.
    """

    in_: HookedVLM
    donor: HookedVLM
    changed: int = 3
    named: tuple[str, ...] = ()
    change: str = "donor"
    seed: int = 0

    def seed_of(self, kind: str, i: int) -> int:
        """Of the i-th pair of a kind, or of `VISIBILITY`."""
        return 100 * MOST * (self.seed + 1) + MOST * (VISIBILITY, *KINDS).index(kind) + i

    def among(self, kind: str) -> list[Component]:
        """What the methods choose among."""
        if kind == "experts" or (kind == "named" and any(".expert." in name for name in self.named)):
            return candidates(self.in_, WITH_EXPERTS)
        early = kind in ("vision", "projector", "tower") or (kind == "named" and self._names_vision)
        return candidates(self.in_, EVERYWHERE if early else DECODER)

    def plant(self, kind: str, i: int) -> Plant:
        """The plant of the i-th pair of a kind.

        Raises:
            FrankenlensError: fewer components than are to change.
        """
        seed = self.seed_of(kind, i)
        if kind in NULLS:
            return Plant(noise=NULLS[kind], seed=seed)
        if kind in WIRED:
            return Plant(wired_names(self.in_, kind, seed), seed=seed)
        if kind == "named":
            return Plant(self.named, self.change, seed=seed)
        if kind not in DRAWN:
            return Plant((self._whole(kind, i),), seed=seed)
        names = draw(self._free(kind), self.changed, seed)
        change = kind if kind in ("random", "rotated") else "donor"
        decoys = self._decoys(names, seed) if kind == "decoys" else ()
        return Plant(names, change, decoys=decoys, seed=seed)

    def _free(self, kind: str) -> list[Component]:
        """What the components of a kind are drawn from."""
        if kind == "experts":
            experts = candidates(self.in_, ("expert",))
            if not experts:
                raise FrankenlensError(
                    f"pairs of kind experts: {type(self.in_.model).__name__} has no experts that could be told apart; "
                    "leave experts out of the kinds."
                )
            free = [one for one in experts if relative_norm(self.in_, self.donor, one.name) > 0]
            what = "experts that RL moved"
        elif kind in ("rotated", *TRAINED):
            free, what = self.among(kind), "components to choose from"
        else:
            free, what = self._moved, "components that RL moved"
        if self.changed >= len(free):
            raise FrankenlensError(f"--changed is {self.changed}, but there are only {len(free)} {what}.")
        return free

    def _whole(self, kind: str, i: int) -> str:
        """A layer, region, vision block or projector, by address."""
        rng = random.Random(self.seed_of(kind, i))
        if kind == "region":
            return thirds(self.in_.n_layers).address(NAMES[i % len(NAMES)])
        if kind == "vision":
            return f"vision.blocks.{rng.randrange(len(self.in_.anatomy.vision.blocks))}"
        if kind == "tower":
            return "vision"
        return kind if kind == "projector" else f"blocks.{rng.randrange(self.in_.n_layers)}"

    def _decoys(self, names: Sequence[str], seed: int) -> tuple[str, ...]:
        free = [f"blocks.{i}.mlp" for i in range(self.in_.n_layers) if f"blocks.{i}.mlp" not in names]
        return tuple(random.Random(seed).sample(free, min(len(names), len(free))))

    @cached_property
    def _moved(self) -> list[Component]:
        """Heads and MLPs that the donor changed at all."""
        every = candidates(self.in_, DECODER)
        return [one for one in every if relative_norm(self.in_, self.donor, one.name) > 0]

    @property
    def _names_vision(self) -> bool:
        return any(one == "projector" or one.startswith("vision") for one in self.named)
