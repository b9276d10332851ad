"""Models whose changed components are known because they were put there: a copy of IN in which some were changed."""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooks import Address, FrankenlensError, HookedVLM, weight_slices
from hooks.weights import WeightSlice
from interp.map.components import Component, components
from interp.transfer.grafts import Graft, require_graftable
from interp.updates import Realized, as_large, random_update, wide_type

CHANGES = ("donor", "random", "rotated")
NOISES = ("none", "gaussian", "bf16")
DECODER = ("mlp_out", "head")
EVERYWHERE = (*DECODER, "vision", "projector")
WITH_EXPERTS = (*DECODER, "expert")
_DIGITS = 8  # significant bits of bfloat16


@dataclass(frozen=True)
class Plant:
    """What a planted model differs in from IN.

    Attributes:
        components: addresses whose weights change; none makes a null pair.
        change: "donor": the donor's weights; "random": a Gaussian update with the norm of the donor's, slice by slice
            (in half precision the donor's own update, shuffled, and brought to its norm where it rounds); "rotated":
            Gaussian noise of the size of the weights is added and the sum brought back to their norm.
        noise: what befalls every other weight: "none"; "gaussian": an update with the norm of what rounding to bfloat16
            changes, tensor by tensor; "bf16": that rounding.
        decoys: MLPs (`blocks.3.mlp`) whose neurons are permuted: their weights move, what they compute does not.
        seed: of everything random.

    Raises:
        FrankenlensError: an unknown change or noise, or a decoy that is no MLP of a layer.
    """

    components: tuple[str, ...] = ()
    change: str = "donor"
    noise: str = "gaussian"
    decoys: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("change", CHANGES), ("noise", NOISES)):
            if getattr(self, name) not in choices:
                raise FrankenlensError(f"{name} {getattr(self, name)!r}: choose of {', '.join(choices)}")
        for one in self.decoys:
            parsed = Address.parse(one)
            if parsed.sub != "mlp" or parsed.unit is not None or parsed.layer is None:
                raise FrankenlensError(f"a decoy is the MLP of a layer, such as blocks.3.mlp, not {one!r}")

    def holds(self, component: str) -> bool:
        """Whether a component lies within those that change."""
        return any(_within(Address.parse(component), Address.parse(one)) for one in self.components)

    def lies_within(self, component: str) -> bool:
        """Whether a part of a component changes, and not all of it: an MLP one of whose experts does."""
        whole = Address.parse(component)
        inside = any(_within(Address.parse(one), whole) for one in self.components)
        return inside and not self.holds(component)


@dataclass(frozen=True, eq=False)
class Planted:
    """A copy of IN with a plant.

    Attributes:
        vlm: the model.
        held: what its weights hold of the change that was asked for, all components together.
        noise: of the noise.
    """

    vlm: HookedVLM
    held: Realized
    noise: Realized


def planted(in_: HookedVLM, donor: HookedVLM, plant: Plant) -> HookedVLM:
    """A copy of IN with a plant, as `planted_and_measured` makes it."""
    return planted_and_measured(in_, donor, plant).vlm


@torch.no_grad()
def planted_and_measured(in_: HookedVLM, donor: HookedVLM, plant: Plant) -> Planted:
    """A copy of IN with a plant, and how much of it the weights hold; both models given stay as they are.

    Args:
        in_: what is copied, in memory once more.
        donor: where the changed components' weights come from, or the size of their update: RL, or a model that was
            trained with everything else frozen.
        plant: what changes.

    Raises:
        FrankenlensError: an address names nothing in the model, or twice the same weights; the donor does not differ
            there; weights are not in memory (offloaded); rounding would change nothing; IN's type does not hold the
            plant or the noise (`interp.updates`).
    """
    own, theirs = (dict(vlm.model.named_parameters()) for vlm in (in_, donor))
    offloaded = [name for some in (own, theirs) for name, p in some.items() if p.is_meta]
    if offloaded:
        raise FrankenlensError(f"{offloaded[0]} is offloaded; load both models into memory (device_map=None)")
    changed = []
    if plant.components:
        ((_, changed),) = require_graftable(in_, donor, [Graft(plant.components)])
    if plant.change != "rotated":
        _require_a_difference(changed, own, theirs, plant)
    if plant.noise == "bf16" and all(on_grid(p) for p in own.values()):
        raise FrankenlensError(
            "every weight of IN is a bfloat16 number already, so that rounding changes nothing"
        )
    model = copy.deepcopy(in_.model)
    new = dict(model.named_parameters())
    held, noise = Realized(), Realized()
    for name, parameter in new.items():
        value, found = _noisy(own[name], plant, name)
        noise += found
        parameter.copy_(value)
    for piece in changed:
        part = piece.of(own[piece.parameter])
        value, found = _changed(
            part, piece.of(theirs[piece.parameter]), plant, f"{piece.parameter} {piece.start}"
        )
        held += found
        piece.of(new[piece.parameter]).copy_(value)
    dtype = in_.model.dtype
    held.require(f"the plant in {', '.join(plant.components)}", dtype)
    noise.require("the noise beside the plant", dtype)
    for one in plant.decoys:
        _permute_neurons(model, in_, one, plant.seed)
    return Planted(HookedVLM(model, in_.processor, check=False), held, noise)


def on_grid(weight: Float[Tensor, "..."]) -> bool:
    """Whether every entry is a bfloat16 number."""
    return bool((weight.to(torch.bfloat16).to(weight.dtype) == weight).all())


def draw(candidates: Sequence[Component], n: int, seed: int) -> tuple[str, ...]:
    """The names of n different components, drawn at random."""
    return tuple(component.name for component in random.Random(seed).sample(list(candidates), n))


def candidates(vlm: HookedVLM, points: Sequence[str] = DECODER) -> list[Component]:
    """What a method has to choose among: heads and MLPs of the decoder, or more (`EVERYWHERE`, `WITH_EXPERTS`)."""
    return components(vlm, points)


def told_apart(among: Sequence[Component], plant: Plant) -> list[Component]:
    """The candidates that a plant either changed or left alone; not those of which it changed a part."""
    return [component for component in among if not plant.lies_within(component.name)]


def truth(among: Sequence[Component], plant: Plant) -> Bool[Tensor, " component"]:
    """Which candidates a plant changed."""
    return torch.tensor([plant.holds(component.name) for component in among])


def _within(inner: Address, outer: Address) -> bool:
    if outer.kind != "blocks":
        whole_tower = outer.kind == "vision" and inner.kind == "blocks" and inner.tower == "vision"
        return inner.kind == outer.kind or whole_tower
    if inner.kind != "blocks" or inner.tower != outer.tower:
        return False
    if inner.layers is None or outer.layers is None or not _inside(inner.layers, outer.layers):
        return False
    if outer.sub is None:
        return True
    if inner.sub != outer.sub or outer.unit is None or outer.units is None:
        return inner.sub == outer.sub
    return inner.unit == outer.unit and inner.units is not None and _inside(inner.units, outer.units)


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _require_a_difference(
    changed: Sequence[WeightSlice], own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], plant: Plant
) -> None:
    pairs = ((p.of(own[p.parameter]), p.of(theirs[p.parameter])) for p in changed)
    if changed and all(torch.equal(before, after.to(before)) for before, after in pairs):
        raise FrankenlensError(
            f"the donor has IN's own weights in {', '.join(plant.components)}, so nothing would change there; name "
            'components that were trained, or give change="rotated"'
        )


def _noisy(
    weight: Float[Tensor, "*shape"], plant: Plant, name: str
) -> tuple[Float[Tensor, "*shape"], Realized]:
    if plant.noise == "none":
        return weight, Realized()
    if plant.noise == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype), Realized()
    wide = weight.to(wide_type(weight))
    noise = _gaussian(wide, _rounding_norm(wide), plant.seed, "noise " + name)
    new = as_large(weight, noise, _seed(plant.seed, "noise " + name))
    return new, Realized.of(weight, new, noise, directed=False)


def _rounding_norm(weight: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Of what rounding to bfloat16 changes; of weights on its grid, what it would on average: sqrt(sum gap^2 / 12)."""
    if not on_grid(weight):
        return (weight.to(torch.bfloat16).to(weight.dtype) - weight).norm()
    gaps = torch.ldexp((weight != 0).to(weight), torch.frexp(weight).exponent - _DIGITS)
    return (gaps.square().sum() / 12).sqrt()


def _changed(
    own: Float[Tensor, "*shape"], theirs: Float[Tensor, "*shape"], plant: Plant, name: str
) -> tuple[Float[Tensor, "*shape"], Realized]:
    """The weights with their change, and what they hold of it."""
    wide = own.to(wide_type(own, theirs))
    delta = theirs.to(wide) - wide
    if plant.change == "donor":
        new = theirs.to(own)
        return new, Realized.of(own, new, delta)
    seed = _seed(plant.seed, name)
    if plant.change == "random":
        update = random_update(delta, own.dtype, seed)
        new = as_large(own, update, seed)
        return new, Realized.of(own, new, update, directed=False)
    if not wide.any():
        return own, Realized()  # biases that were never trained have no direction to turn from
    size = wide.std(correction=0) * wide.numel() ** 0.5
    moved = wide + _gaussian(wide, size, plant.seed, name)
    turned = moved * (wide.norm() / moved.norm())
    new = turned.to(own.dtype)
    return new, Realized.of(own, new, turned - wide)


def _gaussian(
    like: Float[Tensor, "*shape"], norm: Float[Tensor, ""], seed: int, name: str
) -> Float[Tensor, "*shape"]:
    """Of that norm; the same for the same seed and name, whatever else is planted."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(_seed(seed, name))).to(like)
    return noise * (norm / noise.norm())


def _seed(seed: int, name: str) -> int:
    return seed * 1_000_003 + zlib.crc32(name.encode())


def _permute_neurons(model: nn.Module, in_: HookedVLM, address: str, seed: int) -> None:
    """One order for the rows of every matrix into the MLP and the columns of the one out of it."""
    parameters = dict(model.named_parameters())
    first = weight_slices(in_.model, in_.anatomy, f"{address}.neuron.0")
    n = next(parameters[piece.parameter].shape[1] for piece in first if piece.dim == 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(_seed(seed, address)))
    for piece in first:
        assert piece.dim is not None
        window = parameters[piece.parameter].narrow(piece.dim, piece.start, n)
        window.copy_(window.index_select(piece.dim, order.to(window.device)))
