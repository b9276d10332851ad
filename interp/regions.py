"""Neighbouring layers: partitions of the decoder into named regions (Early, Mid, Late, or any other), and runs.

Runs (`singles`, `suffixes`, `windows`, `around`) are for whatever is done in one after another: knockouts, swaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from hooks.errors import FrankenlensError, shown

LONGEST = 10_000
"""Layers of a region, at most."""
NAMES = ("Early", "Mid", "Late")
Span = tuple[int, int]
"""First and last layer, inclusive."""


@dataclass(frozen=True)
class Partition:
    """Every decoder layer in exactly one region.

    Attributes:
        name: how it was made; printed on every result.
        regions: region to its first and last layer, inclusive, in order.

    Raises:
        FrankenlensError: regions leave a layer out, or share one.

    Example:
        >>> fl.thirds(28).address("Mid")
        'blocks.10-18'
    """

    name: str
    regions: Mapping[str, tuple[int, int]]

    def __post_init__(self) -> None:
        expected = 0
        for region, (first, last) in self.regions.items():
            if first != expected or last < first:
                raise FrankenlensError(
                    f"partition {self.name!r}: region {region!r} is layers {first}-{last}, but the next layer to cover "
                    f"is {expected}; regions must follow one another without gap or overlap"
                )
            expected = last + 1
        if not self.regions:
            raise FrankenlensError(f"partition {self.name!r} has no regions")

    @property
    def n_layers(self) -> int:
        """Layers that it covers."""
        return list(self.regions.values())[-1][1] + 1

    def address(self, region: str) -> str:
        """The region's address, e.g. `blocks.0-9`.

        Raises:
            FrankenlensError: no such region.
        """
        if region not in self.regions:
            raise FrankenlensError(f"there is no region {region!r}, only {', '.join(self.regions)}")
        first, last = self.regions[region]
        return f"blocks.{first}-{last}" if last > first else f"blocks.{first}"

    def require(self, n_layers: int) -> None:
        """Refuses a model of another depth.

        Raises:
            FrankenlensError: says how many layers each has.
        """
        if n_layers != self.n_layers:
            raise FrankenlensError(
                f"partition {self.name!r} covers layers 0-{self.n_layers - 1}; the model has {n_layers}"
            )

    def __str__(self) -> str:
        spans = ", ".join(f"{name} {first}-{last}" for name, (first, last) in self.regions.items())
        return f"{self.name}: {spans}"


def of_sizes(sizes: Sequence[int], names: Sequence[str] = NAMES, name: str | None = None) -> Partition:
    """Regions of so many layers each, from the bottom up.

    Raises:
        FrankenlensError: not one name per size, or a size below 1.

    Example:
        >>> print(fl.of_sizes([2, 7], ["reads", "writes"]))
        2/7: reads 0-1, writes 2-8
    """
    whole = all(isinstance(size, Integral) and 1 <= size <= LONGEST for size in sizes)
    if len(sizes) != len(names) or not sizes or not whole:
        raise FrankenlensError(
            f"{shown(list(sizes))} and {shown(list(names))}: give one size of at least 1 per region"
        )
    ends = np.cumsum(sizes).tolist()
    spans = {region: (end - size, end - 1) for region, size, end in zip(names, sizes, ends, strict=True)}
    return Partition(name or "/".join(map(str, sizes)), spans)


def thirds(n_layers: int, how: str = "paper") -> Partition:
    """Early, Mid and Late thirds of 2602.12395.

    Args:
        n_layers: of the decoder, at least 3.
        how: "paper": what does not divide by 3 goes to the first regions (28 layers: 10/9/9); "code": cuts at n//3
            and 2n//3, as in its released code (28 layers: 9/9/10).

    Raises:
        FrankenlensError: another `how`, or fewer than three layers.

    Example:
        >>> print(fl.thirds(28))
        thirds (paper): Early 0-9, Mid 10-18, Late 19-27
        >>> print(fl.thirds(28, "code"))
        thirds (code): Early 0-8, Mid 9-17, Late 18-27
    """
    if how not in ("paper", "code") or n_layers < 3:
        raise FrankenlensError(f"thirds({n_layers}, {how!r}): give at least 3 layers, and 'paper' or 'code'")
    if how == "paper":
        sizes = [len(part) for part in np.array_split(np.arange(n_layers), 3)]
    else:
        sizes = [n_layers // 3, 2 * n_layers // 3 - n_layers // 3, n_layers - 2 * n_layers // 3]
    return of_sizes(sizes, name=f"thirds ({how})")


def parse_partition(text: str, n_layers: int) -> Partition:
    """ "paper", "code", or sizes such as "8/12/8".

    Raises:
        FrankenlensError: it is none of these, or does not cover the model.

    Example:
        >>> print(fl.parse_partition("8/12/8", 28))
        8/12/8: Early 0-7, Mid 8-19, Late 20-27
    """
    if not isinstance(text, str):
        raise FrankenlensError(f'{shown(text)} is no partition; give paper, code or sizes such as "8/12/8"')
    if text in ("paper", "code"):
        return thirds(n_layers, text)
    try:
        sizes = [int(size) for size in text.split("/", LONGEST)]
    except ValueError:
        raise FrankenlensError(
            f'{shown(text)} is no partition; give paper, code or sizes such as "8/12/8"'
        ) from None
    names = NAMES if len(sizes) == 3 else [f"region {i}" for i in range(len(sizes))]
    partition = of_sizes(sizes, names)
    partition.require(n_layers)
    return partition


def singles(n_layers: int) -> list[Span]:
    """Each layer alone."""
    return [(layer, layer) for layer in range(n_layers)]


def suffixes(n_layers: int) -> list[Span]:
    """For each layer k, every layer from k on."""
    return [(layer, n_layers - 1) for layer in range(n_layers)]


def windows(n_layers: int, width: int) -> list[Span]:
    """Every run of `width` neighbouring layers.

    Raises:
        FrankenlensError: there are not so many layers.
    """
    _require_width(width, n_layers)
    return [(layer, layer + width - 1) for layer in range(n_layers - width + 1)]


def around(n_layers: int, width: int) -> list[Span]:
    """For each layer, the `width` layers around it; fewer at either end (2304.14767, 2411.18620: width 9).

    Raises:
        FrankenlensError: there are not so many layers.
    """
    _require_width(width, n_layers)
    before, after = (width - 1) // 2, width // 2
    return [(max(0, layer - before), min(n_layers - 1, layer + after)) for layer in range(n_layers)]


def _require_width(width: int, n_layers: int) -> None:
    if not 1 <= width <= n_layers:
        raise FrankenlensError(f"windows of {width} layers: the tower has {n_layers}; give 1 to {n_layers}")
