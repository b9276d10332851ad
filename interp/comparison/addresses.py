"""A comparison by address, down to single heads: which part of the update lies in the slices that a component owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from hooks.address import Address
from hooks.errors import FrankenlensError
from hooks.stored.checkpoint import PART, Checkpoint
from hooks.weights import WeightSlice, buffer_slices, n_units, part_paths, weight_slices, wholes
from interp.comparison.adapted import Source
from interp.comparison.aggregate import cosines
from interp.comparison.stored import counted_in
from interp.comparison.table import chance, opened
from interp.comparison.workers import READERS, in_threads

SUMS = ("squares", "reference", "unchanged")
"""Per stage: squares of the update, squares of W_IN, entries that are the same before and after (`counted_in`)."""
_Key = tuple[str, int]
_PARTS = ("attn", "cross_attn", "mixer", "mlp")
_UNITS = ("attn.head", "attn.kv_head", "cross_attn.head", "cross_attn.kv_head", "mlp.expert")


def every_address(checkpoint: Checkpoint) -> list[str]:
    """Every component with weights: the wholes, layers, their parts, heads, shared kv heads and experts."""
    model, anatomy = checkpoint.model, checkpoint.anatomy
    found = [name for name in wholes(model, anatomy) if "blocks" not in name]
    for prefix, tower in anatomy.towers.items():
        for layer, block in enumerate(tower.blocks):
            name = f"{prefix}blocks.{layer}"
            found += [name, *(f"{name}.{sub}" for sub in _PARTS if part_paths(block, sub))]
            for unit in _UNITS:
                found += _units(checkpoint, Address.parse(f"{name}.{unit}.0"))
    return found


def _units(checkpoint: Checkpoint, first: Address) -> list[str]:
    """All heads, kv heads or experts of a block; none where they own no weights."""
    model, anatomy = checkpoint.model, checkpoint.anatomy
    tower = anatomy.towers["" if first.tower == "text" else f"{first.tower}."]
    try:
        weight_slices(model, anatomy, first)
        n = n_units(model, tower.blocks[first.layer or 0], first)
    except FrankenlensError:
        return []
    return [str(replace(first, units=(unit, unit))) for unit in range(n)]


def owned(checkpoint: Checkpoint, addresses: Sequence[Address | str]) -> dict[str, list[WeightSlice]]:
    """The slices of each address (`hooks.weights.weight_slices`), of tensors as `Checkpoint.tensors` names them.

    Raises:
        FrankenlensError: an address is none, or names nothing in this model.
    """
    found = {}
    for address in addresses:
        model, anatomy = checkpoint.model, checkpoint.anatomy
        pieces = [*weight_slices(model, anatomy, address), *buffer_slices(model, anatomy, address)]
        found[str(address)] = [
            WeightSlice(checkpoint.ties.get(one.parameter, one.parameter), one.dim, one.start, one.length)
            for one in pieces
        ]
    return found


def by_address(
    table: pd.DataFrame,
    in_: Source,
    rl: Source,
    base: Source | None = None,
    addresses: Sequence[Address | str] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """One row per address and stage.

    Columns: address, section, layer_index, unified_index, part (block, attn, cross_attn, mixer, mlp, head, kv_head,
    neuron, expert or the whole's own name), index (of a head, neuron or expert); n, fro_norm, reference_norm,
    relative_norm, sparsity, scalar_product, cosine and cosine_chance, as in `compare`, of all entries that the address
    owns together. Addresses contain one another (a layer its heads), so rows do not add up; heads and kv heads of a
    layer do not overlap.

    Args:
        table: what `compare` returned for the same checkpoints.
        in_, rl, base: as they were given to `compare`.
        addresses: e.g. `blocks.9-18.mlp`; all that `every_address` lists by default.
        progress: whether a bar is shown.

    Raises:
        FrankenlensError: an address names nothing, or the table is of other checkpoints.
    """
    checkpoints, stages = opened(in_, rl, base)
    _require_table(table, checkpoints, stages)
    slices = owned(checkpoints[0], every_address(checkpoints[0]) if addresses is None else addresses)
    keys = list(
        dict.fromkeys(_key(one) for pieces in slices.values() for one in pieces if one.dim is not None)
    )
    sizes = [checkpoints[0].tensors[name].entries for name, _ in keys]
    found = in_threads(
        lambda key: _margins(checkpoints, *key), keys, sizes, "heads", progress, at_least=READERS
    )
    margins = dict(zip(keys, found, strict=True))
    whole = table.set_index(["stage", "param_name"])
    rows = []
    for k, stage in enumerate(stages):
        of_stage = whole.loc[stage].to_dict("index")
        for address, pieces in slices.items():
            parts = [_part(one, k, of_stage, margins) for one in pieces]
            rows.append(labels(address, checkpoints[0]) | {"stage": stage} | _row(parts))
    result = pd.DataFrame(rows).astype(dict.fromkeys(("layer_index", "unified_index", "index"), "Int64"))
    if len(stages) == 2:
        result["cosine"] = cosines(result, ["address"])
    return result


def _require_table(table: pd.DataFrame, checkpoints: Sequence[Checkpoint], stages: Sequence[str]) -> None:
    names = ("base", "in", "rl")[-len(checkpoints) :]
    given = {name: str(one.folder) for name, one in zip(names, checkpoints, strict=True)}
    made = {stage: table.attrs.get(stage) for stage in given}
    if made != given or set(table["stage"]) != set(stages):
        raise FrankenlensError(
            f"the table is of {made}, not of {given}; give by_address the checkpoints that compare() was given."
        )


def _key(one: WeightSlice) -> _Key:
    return one.parameter, one.dim or 0


@torch.no_grad()
def _margins(
    checkpoints: Sequence[Checkpoint], name: str, dim: int
) -> tuple[dict[str, Float[np.ndarray, "stage index"]], Float[np.ndarray, " index"], int]:
    """Sums over each row (dim 0) or column (dim 1) of a tensor; the scalar products; entries in each."""
    shape = checkpoints[0].tensors[name].matrix or (checkpoints[0].tensors[name].entries, 1)
    sums = {what: torch.zeros(len(checkpoints) - 1, shape[dim], dtype=torch.float64) for what in SUMS}
    products = torch.zeros(shape[dim], dtype=torch.float64)
    first = 0
    for parts in zip(*(one.parts(name, _rows(shape) * shape[1]) for one in checkpoints), strict=True):
        weights = [part.view(-1, shape[1]).double() for part in parts]
        here = slice(first, first + len(weights[0])) if dim == 0 else slice(None)
        deltas = [after - before for before, after in pairwise(weights)]
        for k, delta in enumerate(deltas):
            kind = counted_in(*(one.tensors[name].dtype for one in checkpoints[k : k + 2]))
            same = weights[k].to(kind) == weights[k + 1].to(kind)
            for what, values in zip(SUMS, (delta.square(), weights[-2].square(), same), strict=True):
                sums[what][k, here] += values.sum(1 - dim, dtype=torch.float64)
        products[here] += (deltas[0] * deltas[-1]).sum(1 - dim)
        first += len(weights[0])
    return {what: found.numpy() for what, found in sums.items()}, products.numpy(), shape[1 - dim]


def _rows(shape: tuple[int, int]) -> int:
    return max(1, (PART >> 2) // shape[1])


def _part(
    one: WeightSlice,
    stage: int,
    whole: dict[Any, dict[str, Any]],
    margins: dict[_Key, tuple[dict[str, Float[np.ndarray, "..."]], Float[np.ndarray, " index"], int]],
) -> dict[str, Any]:
    """Sums over one slice."""
    if one.dim is None:
        row = whole[one.parameter]
        return {
            "squares": row["fro_norm"] ** 2,
            "reference": row["reference_norm"] ** 2,
            "unchanged": row["sparsity"] * row["n"],
            "product": row["scalar_product"],
            "n": row["n"],
        }
    sums, products, each = margins[_key(one)]
    here = slice(one.start, one.start + one.length)
    found = {what: float(values[stage, here].sum()) for what, values in sums.items()}
    return found | {"product": float(products[here].sum()), "n": one.length * each}


def _row(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total = {what: sum(part[what] for part in parts) for what in parts[0]}
    n, norm, reference = total["n"], total["squares"] ** 0.5, total["reference"] ** 0.5
    return {
        "n": n,
        "fro_norm": norm,
        "reference_norm": reference,
        "relative_norm": norm / reference if reference else np.nan,
        "sparsity": total["unchanged"] / n,
        "scalar_product": total["product"],
        "cosine": np.nan,
        "cosine_chance": chance(n),
    }


def labels(address: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Where an address is in the network, in the columns of `by_address`."""
    parsed = Address.parse(address)
    labels: dict[str, Any] = {"address": address, "section": _section(parsed), "layer_index": None}
    labels |= {"unified_index": -1 if parsed.kind == "projector" else None}
    if parsed.layers is not None and parsed.layers[0] == parsed.layers[1]:
        labels["layer_index"] = parsed.layer
        before = {"text": 0, "vision": -len(checkpoint.anatomy.vision.blocks) - 1}.get(parsed.tower)
        labels["unified_index"] = None if before is None else parsed.layers[0] + before
    single = parsed.units is not None and parsed.units[0] == parsed.units[1]
    part = parsed.unit or parsed.sub or ("block" if parsed.layers is not None else parsed.kind)
    return labels | {"part": part, "index": parsed.index if single else None}


def _section(address: Address) -> str:
    if address.kind == "blocks":
        return {"text": "decoder", "vision": "vision"}.get(address.tower, "rest")
    return {"embed": "embeddings", "ln_final": "norm", "unembed": "head"}.get(address.kind, address.kind)
