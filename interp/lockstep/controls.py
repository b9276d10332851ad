"""Random components as many and of the same kinds as those chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from hooks import Address, FrankenlensError, HookedVLM
from hooks.weights import n_units, part_paths

Kind = tuple[str, str | None, str | None]
"""Tower (or the address itself where there is only one such component), sublayer and unit."""


def kind_of(address: Address) -> Kind:
    """What a component is one of."""
    return (address.tower if address.kind == "blocks" else address.kind, address.sub, address.unit)


def alike(vlm: HookedVLM, kind: Kind) -> list[str]:
    """Every component of a kind, in order."""
    where, sub, unit = kind
    if where not in ("text", "vision"):
        return [where]
    tower = vlm.anatomy.text if where == "text" else vlm.anatomy.vision
    found = []
    for layer, block in enumerate(tower.blocks):
        base = f"{'vision.' if where == 'vision' else ''}blocks.{layer}" + (f".{sub}" if sub else "")
        if sub is not None and not part_paths(block, sub):
            continue
        if unit is None:
            found.append(base)
            continue
        try:
            size = n_units(vlm.model, block, Address.parse(f"{base}.{unit}.0"))
        except FrankenlensError:  # no such units in this block
            size = 0
        found += [f"{base}.{unit}.{i}" for i in range(size)]
    return found


def single(components: Sequence[str]) -> tuple[str, ...]:
    """Addresses one by one, ranges spelt out, none twice.

    Raises:
        FrankenlensError: not an address.
    """
    return tuple(dict.fromkeys(str(one) for name in components for one in Address.parse(name).expand()))


def overlap(one: Address, other: Address) -> bool:
    """Whether two single components share anything: a head and its attention do, two heads do not."""
    if one.kind != "blocks" or other.kind != "blocks":
        return one.kind == other.kind
    if (one.tower, one.layers) != (other.tower, other.layers):
        return False
    if one.sub is None or other.sub is None or one.sub != other.sub:
        return one.sub is None or other.sub is None
    return one.unit is None or other.unit is None or (one.unit, one.units) == (other.unit, other.units)


def _others(names: Sequence[str], barred: Sequence[Address]) -> list[str]:
    """Those of the names that share nothing with what is barred."""
    return [
        name for name, place in ((n, Address.parse(n)) for n in names)
        if not any(overlap(place, other) for other in barred)
    ]  # fmt: skip


def random_components(
    vlm: HookedVLM, components: Sequence[str], n: int, seed: int = 0, avoid: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """n sets of components, each with as many of every kind as `components`, and nothing of these.

    Args:
        vlm: the model.
        components: addresses.
        n: sets; no two are the same. Where there are fewer different ones, all that are found.
        seed: of the draw.
        avoid: more addresses that are not drawn, e.g. others that a map found strong.

    Raises:
        FrankenlensError: a kind has too few others; names it.
    """
    chosen = single(components)
    counts = Counter(kind_of(Address.parse(name)) for name in chosen)
    barred = [Address.parse(name) for name in (*chosen, *single(avoid))]
    pools = {kind: _others(alike(vlm, kind), barred) for kind in counts}
    for kind, pool in pools.items():
        if len(pool) < counts[kind] and n:
            what = ".".join(part for part in kind if part)
            raise FrankenlensError(
                f"{counts[kind]} components of the kind {what} are chosen and {len(pool)} others are left, too few "
                "for a random set of equal number: choose fewer (a kind of which there is one has no control), or "
                "n_random=0"
            )
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, ...], None] = {}
    for _ in range(50 * n):
        if len(found) == n:
            break
        drawn = [
            name for kind, pool in pools.items() for name in rng.choice(pool, counts[kind], replace=False)
        ]
        places = [Address.parse(str(name)) for name in drawn]
        if not any(overlap(one, other) for one, other in combinations(places, 2)):
            found[tuple(sorted(map(str, drawn)))] = None
    return list(found)
