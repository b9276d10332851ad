"""The energy of an update by address, from the weights of two models that are open."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks import HookedVLM
from hooks.address import Address
from hooks.errors import FrankenlensError
from hooks.weights import WeightSlice, n_units, part_paths, weight_slices, wholes

_PARTS = ("attn", "cross_attn", "mixer", "mlp")
_UNITS = ("attn.head", "cross_attn.head")


def addresses_of(vlm: HookedVLM) -> list[str]:
    """The wholes outside of blocks, and of every block itself, its parts and its query heads."""
    model, anatomy = vlm.model, vlm.anatomy
    found = [name for name in wholes(model, anatomy) if "blocks" not in name]
    for prefix, tower in anatomy.towers.items():
        for layer, block in enumerate(tower.blocks):
            name = f"{prefix}blocks.{layer}"
            found += [name, *(f"{name}.{sub}" for sub in _PARTS if part_paths(block, sub))]
            for unit in _UNITS:
                first = Address.parse(f"{name}.{unit}.0")
                try:
                    weight_slices(model, anatomy, first)
                    found += [f"{name}.{unit}.{i}" for i in range(n_units(model, block, first))]
                except FrankenlensError:  # none, or packed in a way that gives a head no rows of its own
                    continue
    return found


@torch.no_grad()
def update_energy(in_: HookedVLM, rl: HookedVLM, addresses: Sequence[str] | None = None) -> pd.DataFrame:
    """Norm of the update of every address, as the two models hold their weights.

    Addresses contain one another (a block its attention, that its heads), so rows do not add up.

    Args:
        in_, rl: opened, a pair.
        addresses: by default all that `addresses_of` lists.

    Returns:
        One row per address: fro_norm (root of the sum of squares of W_RL - W_IN), reference_norm (the same of W_IN),
        relative_norm (their ratio), n (entries).

    Raises:
        FrankenlensError: an address names nothing, or weights are offloaded to where they cannot be read.
    """
    weights = [dict(vlm.model.named_parameters(remove_duplicate=False)) for vlm in (in_, rl)]
    wanted = addresses_of(in_) if addresses is None else addresses
    rows = []
    for address in wanted:
        squares = reference = 0.0
        n = 0
        for piece in weight_slices(in_.model, in_.anatomy, address):
            before, after = (_read(own, piece) for own in weights)
            squares += (after - before).square().sum().item()
            reference += before.square().sum().item()
            n += before.numel()
        rows.append((address, squares**0.5, reference**0.5, n))
    found = pd.DataFrame(rows, columns=["address", "fro_norm", "reference_norm", "n"])
    found["relative_norm"] = found["fro_norm"] / found["reference_norm"].where(found["reference_norm"] > 0)
    return found


def _read(weights: dict[str, torch.nn.Parameter], piece: WeightSlice) -> Float[Tensor, "..."]:
    weight = weights[piece.parameter]
    if weight.is_meta:
        raise FrankenlensError(
            f"{piece.parameter} is offloaded, so its update is not read here: open the models where they fit, or "
            "compare their files (frankenlens compare)."
        )
    return piece.of(weight.detach()).cpu().double()
