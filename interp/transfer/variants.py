"""Variants of IN with some of RL's weights: mixtures of regions, parts of the rest, sublayers, heads, doses, controls.

Where the paper's rest of the model (vision tower, projector, embeddings, final norm, head) follows the donor of the
Early layers (2602.12395), here it stays IN's unless asked for, and each of its parts is a variant of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from hooks import Address, FrankenlensError, HookedVLM
from hooks.weights import part_paths
from interp.regions import Partition
from interp.transfer.grafts import Graft, everything

PAPER_ORDER = ("I:R:R", "I:I:R", "R:R:I", "R:I:I", "I:R:I", "R:I:R")
CONTROLS = ("random", "layers")
MAX_REGIONS = 6  # 62 mixtures


@dataclass(frozen=True)
class Variant:
    """IN with grafts from RL.

    Attributes:
        name: unique, e.g. "I:R:R".
        grafts: what is put in.
        kind: "order", "factor", "part", "address", "dose" or "control".
        control_of: of a control, the variant that it stands beside.
    """

    name: str
    grafts: tuple[Graft, ...]
    kind: str
    control_of: str = ""


def orders(partition: Partition, vlm: HookedVLM, rest: str = "recipient") -> list[Variant]:
    """Every mixture of the regions' blocks: "R" from RL, "I" IN's own. Three regions: the six of Table 2, in its order.

    Args:
        partition: of the decoder.
        vlm: the recipient.
        rest: what is not a decoder block: "recipient" keeps IN's, "early" takes that of the first region's donor, as
            the paper's models do.

    Raises:
        FrankenlensError: the partition does not cover the model, has one region or more than `MAX_REGIONS`, or another
            `rest`.

    Example:
        >>> mixtures = fl.orders(fl.thirds(pair.in_.n_layers), pair.in_)
        >>> [(variant.name, *variant.grafts[0].addresses) for variant in mixtures[:2]]
        [('I:R:R', 'blocks.3-5', 'blocks.6-8'), ('I:I:R', 'blocks.6-8')]
    """
    partition.require(vlm.n_layers)
    if rest not in ("recipient", "early"):
        raise FrankenlensError(f'rest={rest!r}: give "recipient" or "early"')
    regions = list(partition.regions)
    if not 2 <= len(regions) <= MAX_REGIONS:
        raise FrankenlensError(f"{partition} has {len(regions)} regions; mixtures need 2 to {MAX_REGIONS}")
    names = [":".join(letters) for letters in product("IR", repeat=len(regions))][1:-1]
    found = []
    for name in PAPER_ORDER if len(regions) == 3 else names:
        taken = [region for region, letter in zip(regions, name.split(":"), strict=True) if letter == "R"]
        addresses = tuple(partition.address(region) for region in taken)
        if rest == "early" and name.startswith("R"):
            addresses += rest_of(vlm)
        found.append(Variant(name, (Graft(addresses),), "order"))
    return found


def rest_of(vlm: HookedVLM) -> tuple[str, ...]:
    """The addresses of everything but the decoder blocks."""
    return tuple(address for address in everything(vlm) if not address.startswith("blocks"))


def factors(vlm: HookedVLM) -> list[Variant]:
    """All decoder blocks; all the rest; and each part of the rest alone (a tied head goes with the embeddings)."""
    rest = rest_of(vlm)
    found = [("all blocks", (_blocks(vlm),)), ("all but blocks", rest), *((one, (one,)) for one in rest)]
    return [Variant(name, (Graft(addresses),), "factor") for name, addresses in found]


def parts(vlm: HookedVLM, partition: Partition | None = None) -> list[Variant]:
    """All attention and all MLPs of the decoder (mixers and cross-attention where it has some); of each region as well
    where a partition is given.

    The norms before them belong to neither.
    """
    spans = {"all": _blocks(vlm)}
    spans |= {region: partition.address(region) for region in partition.regions} if partition else {}
    found = []
    for where, address in spans.items():
        for part in ("attn", "cross_attn", "mixer", "mlp"):
            having = [str(one) for one in Address.parse(f"{address}.{part}").expand() if _has(vlm, one)]
            whole = len(having) == len(list(Address.parse(address).expand()))
            addresses = (f"{address}.{part}",) if whole else tuple(having)
            found += [Variant(f"{where} {part}", (Graft(addresses),), "part")] if having else []
    return found


def _has(vlm: HookedVLM, part: Address) -> bool:
    """Whether a decoder block has this part."""
    return bool(part_paths(vlm.anatomy.text.blocks[part.layer or 0], part.sub or ""))


def addressed(addresses: Sequence[str]) -> list[Variant]:
    """One variant per address, e.g. `blocks.3.attn.head.1`.

    Example:
        >>> [variant.name for variant in fl.addressed(["blocks.0", "blocks.3.attn.head.1"])]
        ['blocks.0', 'blocks.3.attn.head.1']
    """
    return [Variant(address, (Graft((address,)),), "address") for address in addresses]


def doses(vlm: HookedVLM, coefficients: Sequence[float] = (), ranks: Sequence[int] = ()) -> list[Variant]:
    """RL's update of the whole model scaled (between 0 and 1: interpolation), and at low rank."""
    whole = everything(vlm)
    found = [Variant(f"{c:g} x update", (Graft(whole, c),), "dose") for c in coefficients]
    low = [Graft(whole, form="low_rank", rank=rank) for rank in ranks]
    return found + [Variant(f"rank {graft.rank} update", (graft,), "dose") for graft in low]


def controls(
    variants: Sequence[Variant],
    partition: Partition,
    kinds: Sequence[str] = CONTROLS,
    draws: int = 1,
    seed: int = 0,
) -> list[Variant]:
    """What stands beside each variant.

    "random": an update as large in every tensor, of random direction. "layers": RL's update in as many decoder layers,
    drawn at random; never those of a mixture, nor any set twice. Anything outside the blocks is as in the variant. Only
    a mixture (kind "order") has it: a warning names the others.

    Args:
        variants: controls among them have none of their own.
        partition: that of the mixtures.
        kinds: of `CONTROLS`.
        draws: of each kind.
        seed: of all draws.

    Raises:
        FrankenlensError: another kind, no draws, or no set of layers is left to draw.
    """
    for kind in kinds:
        if kind not in CONTROLS:
            raise FrankenlensError(f"there is no control {kind!r}; choose of {', '.join(CONTROLS)}")
    if draws < 1:
        raise FrankenlensError(f"{draws} draws of each control; give at least 1, or no controls")
    own = [variant for variant in variants if variant.kind != "control"]
    others = [variant.name for variant in own if variant.kind != "order"]
    if "layers" in kinds and others:
        warnings.warn(
            f"no control 'layers' stands beside {', '.join(others)}: only a mixture has one (kind 'order')",
            stacklevel=2,
        )
    taken = {_own_layers(variant) for variant in own if variant.kind == "order"}
    rng = np.random.default_rng(seed)
    found = []
    for variant, draw in product(own, range(draws)):
        number = f" {draw + 1}" if draw else ""
        if "random" in kinds:
            grafts = tuple(replace(graft, form="random", seed=seed + draw) for graft in variant.grafts)
            found.append(Variant(f"{variant.name} random update{number}", grafts, "control", variant.name))
        if "layers" in kinds and variant.kind == "order":
            grafts = (Graft(_other_layers(variant, partition, taken, rng)),)
            found.append(Variant(f"{variant.name} random layers{number}", grafts, "control", variant.name))
    return found


def _blocks(vlm: HookedVLM) -> str:
    return f"blocks.0-{vlm.n_layers - 1}"


def _own_layers(variant: Variant) -> tuple[int, ...]:
    addresses = [Address.parse(address) for graft in variant.grafts for address in graft.addresses]
    single = [one for address in addresses if address.kind == "blocks" for one in address.expand()]
    return tuple(sorted(one.layer for one in single if one.layer is not None))


def _other_layers(
    variant: Variant, partition: Partition, taken: set[tuple[int, ...]], rng: np.random.Generator
) -> tuple[str, ...]:
    """Addresses of as many layers, in none of the sets `taken`, and of the variant's rest; adds to `taken`."""
    size = len(_own_layers(variant))
    for _ in range(1000):
        drawn = tuple(sorted(rng.choice(partition.n_layers, size, replace=False).tolist()))
        if drawn not in taken:
            taken.add(drawn)
            rest = [a for graft in variant.grafts for a in graft.addresses if not a.startswith("blocks")]
            return (*(f"blocks.{layer}" for layer in drawn), *rest)
    raise FrankenlensError(
        f"{variant.name}: no other {size} of {partition.n_layers} layers are left to draw; leave the control 'layers' "
        "out, or ask for fewer draws"
    )
