"""Which training runs a freezing experiment has, its controls among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hooks import FrankenlensError
from interp.freezing.losses import UNFROZEN
from interp.regions import Partition

OTHER_SEED = 1000
"""Added to a run's seed for the run that shows what another seed alone does."""
MAX_DRAWS = 1000


@dataclass(frozen=True)
class Arm:
    """One training run: its name, what is frozen, and its seed."""

    name: str
    kind: str
    addresses: tuple[str, ...]
    seed: int
    trained_with: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.name)}-seed{self.seed}"


def plan_arms(
    partition: Partition,
    regions: Sequence[str],
    random: int,
    reruns: int,
    also: Sequence[str],
    seed: int,
    seeds: int,
) -> tuple[Arm, ...]:
    """One run with nothing frozen, and those that are compared with it, for every seed.

    Args:
        partition: of the decoder.
        regions: which of its regions are frozen.
        random: runs with random layers frozen.
        reruns: runs with nothing frozen and another seed.
        also: further runs, each the addresses of one, separated by commas.
        seed, seeds: the first seed and how many; the first draws the random layers too.

    Raises:
        FrankenlensError: no such region, one run asked for twice, or more random runs than there are choices.
    """
    frozen: list[tuple[str, str, tuple[str, ...]]] = [(UNFROZEN, "unfrozen", ())]
    frozen += [(region, "region", (partition.address(region),)) for region in regions]
    drawn = random_layers(partition, random, seed)
    frozen += [(f"random {i + 1}", "random", layers) for i, layers in enumerate(drawn)]
    frozen += [(text, "other", tuple(a.strip() for a in text.split(","))) for text in also]
    arms = []
    for own in range(seed, seed + seeds):
        arms += [Arm(name, kind, addresses, own, own) for name, kind, addresses in frozen]
        arms += [
            Arm(f"unfrozen, other seed {i + 1}", "rerun", (), own, own + OTHER_SEED * (i + 1))
            for i in range(reruns)
        ]
    folders = [arm.folder for arm in arms]
    twice = next((arm.name for arm in arms if folders.count(arm.folder) > 1), None)
    if twice is not None:
        raise FrankenlensError(f"{twice!r} is asked for twice (--regions, --also); name each run once.")
    return tuple(arms)


def random_layers(partition: Partition, n: int, seed: int) -> list[tuple[str, ...]]:
    """Addresses of n draws of layers, as many as the regions have, in turn; no region itself, and no draw repeated.

    Raises:
        FrankenlensError: there are not so many.
    """
    taken = {frozenset(range(a, b + 1)) for a, b in partition.regions.values()}
    sizes = [b - a + 1 for a, b in partition.regions.values()]
    draws = []
    for i in range(n):
        rng, size = np.random.default_rng([seed, 7, i]), sizes[i % len(sizes)]
        found = (frozenset(rng.permutation(partition.n_layers)[:size].tolist()) for _ in range(MAX_DRAWS))
        layers = next((some for some in found if some not in taken), None)
        if layers is None:
            raise FrankenlensError(
                f"--random {n}: {partition.n_layers} layers have no further choice of {size} that is no region; "
                f"give at most {i}."
            )
        taken.add(layers)
        draws.append(tuple(f"blocks.{layer}" for layer in sorted(layers)))
    return draws
