"""Models whose changed components are known because they were put there: a copy of IN in which some were changed."""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooks import Address, FrankenlensError, HookedVLM, weight_slices
from hooks.weights import WeightSlice
from interp.patching import Component, components

CHANGES = ("donor", "random", "rotated")
NOISES = ("none", "gaussian", "bf16")
DECODER = ("mlp_out", "head")
EVERYWHERE = (*DECODER, "vision", "projector")


@dataclass(frozen=True)
class Plant:
    """What a planted model differs in from IN.

    Attributes:
        components: addresses whose weights change; none makes a null pair.
        change: "donor": the donor's weights; "random": a Gaussian update with the norm of the donor's, slice by slice;
            "rotated": Gaussian noise of the size of the weights is added and the sum brought back to their norm.
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


@torch.no_grad()
def planted(in_: HookedVLM, donor: HookedVLM, plant: Plant) -> HookedVLM:
    """A copy of IN with a plant; both models given stay as they are.

    Args:
        in_: what is copied, in memory once more.
        donor: where the changed components' weights come from, or the size of their update: RL, or a model that was
            trained with everything else frozen.
        plant: what changes.

    Raises:
        FrankenlensError: an address names nothing in the model.
    """
    changed = [piece for one in plant.components for piece in weight_slices(in_.model, in_.anatomy, one)]
    model = copy.deepcopy(in_.model)
    own, theirs, new = (dict(m.named_parameters()) for m in (in_.model, donor.model, model))
    for name, parameter in new.items():
        parameter.copy_(_noisy(own[name], plant, name))
    for piece in changed:
        part = piece.of(own[piece.parameter])
        value = _changed(part, piece.of(theirs[piece.parameter]), plant, f"{piece.parameter} {piece.start}")
        piece.of(new[piece.parameter]).copy_(value)
    for one in plant.decoys:
        _permute_neurons(model, in_, one, plant.seed)
    return HookedVLM(model, in_.processor, check=False)


def draw(candidates: Sequence[Component], n: int, seed: int) -> tuple[str, ...]:
    """The names of n different components, drawn at random."""
    return tuple(component.name for component in random.Random(seed).sample(list(candidates), n))


def candidates(vlm: HookedVLM, points: Sequence[str] = DECODER) -> list[Component]:
    """What a method has to choose among: heads and MLPs of the decoder, or more (`EVERYWHERE`)."""
    return components(vlm, points)


def truth(among: Sequence[Component], plant: Plant) -> Bool[Tensor, " component"]:
    """Which candidates a plant changed."""
    return torch.tensor([plant.holds(component.name) for component in among])


def _within(inner: Address, outer: Address) -> bool:
    if outer.kind != "blocks":
        whole_tower = outer.kind == "vision" and inner.kind == "blocks" and inner.tower == "vision"
        return inner.kind == outer.kind or whole_tower
    if inner.kind != "blocks" or inner.tower != outer.tower:
        return False
    if inner.layers is None or outer.layers is None or inner.layer not in _span(outer.layers):
        return False
    if outer.sub is None:
        return True
    if inner.sub != outer.sub or outer.unit is None or outer.units is None:
        return inner.sub == outer.sub
    return inner.unit == outer.unit and inner.index in _span(outer.units)


def _span(ends: tuple[int, int]) -> range:
    return range(ends[0], ends[1] + 1)


def _noisy(weight: Float[Tensor, "*shape"], plant: Plant, name: str) -> Float[Tensor, "*shape"]:
    rounded = weight.to(torch.bfloat16).to(weight.dtype)
    if plant.noise == "none":
        return weight
    if plant.noise == "bf16":
        return rounded
    return weight + _gaussian(weight, (rounded - weight).norm(), plant.seed, "noise " + name)


def _changed(
    own: Float[Tensor, "*shape"], theirs: Float[Tensor, "*shape"], plant: Plant, name: str
) -> Float[Tensor, "*shape"]:
    if plant.change == "donor":
        return theirs.to(own)
    if plant.change == "random":
        return own + _gaussian(own, (theirs.to(own) - own).norm(), plant.seed, name)
    size = own.std(correction=0) * own.numel() ** 0.5
    moved = own + _gaussian(own, size, plant.seed, name)
    return moved * (own.norm() / moved.norm())


def _gaussian(
    like: Float[Tensor, "*shape"], norm: Float[Tensor, ""], seed: int, name: str
) -> Float[Tensor, "*shape"]:
    """Of that norm; the same for the same seed and name, whatever else is planted."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    noise = torch.randn(like.shape, generator=generator).to(like)
    return noise * (norm / noise.norm())


def _permute_neurons(model: nn.Module, in_: HookedVLM, address: str, seed: int) -> None:
    parameters = dict(model.named_parameters())
    first: list[WeightSlice] = weight_slices(in_.model, in_.anatomy, f"{address}.neuron.0")
    order: Tensor | None = None
    for piece in first:
        parameter, dim = parameters[piece.parameter], piece.dim
        assert dim is not None
        if order is None:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(address.encode()))
            order = torch.randperm(parameter.shape[dim], generator=generator)
        parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))
