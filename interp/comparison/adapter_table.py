"""Adapters measured by their own matrices: norm, rank and direction per matrix and per component; nothing is merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from hooks.address import Address
from hooks.errors import FrankenlensError
from hooks.stored.checkpoint import Checkpoint
from hooks.weights import WeightSlice
from interp.comparison.adapted import Adapted, Source, checkpoint_of
from interp.comparison.addresses import every_address, labels, owned
from interp.comparison.low_rank import LowRank
from interp.comparison.names import places
from interp.comparison.table import chance

_Update = LowRank | Float[Tensor, "..."]


def adapter_table(in_: Source, adapter: Source, other: Source | None = None) -> pd.DataFrame:
    """One row per matrix that a LoRA adapter changes, and per tensor that it holds whole.

    Columns: param_name, address, section, layer_index, unified_index, component (`interp.comparison.names.Place`),
    rows, columns, n; kind (product, bias, whole); adapter_rank (r), scaling (s); rank (of s B A, in float64),
    fro_norm, spectral_norm, stable_rank, effective_rank of the update. With `other`, of a second adapter of the same
    model (the parameters of either are rows): fro_norm_other, scalar_product, cosine, and cosine_chance: 95 % of
    independent directions have one between -it and +it. Two runs from one seed begin with the same A, which alone makes
    cosines larger. What does not exist is NaN.

    Costs: thin decompositions of A and B in float64, O((rows + columns) r²) each; the product is never formed. Of a
    tensor that is held whole (`modules_to_save`), IN's is read.

    Args:
        in_: IN, a checkpoint or its folder.
        adapter, other: folders of adapters of IN, or what `Adapted` made of them.

    Raises:
        FrankenlensError: as `interp.comparison.adapter.Adapter`; or an adapter of DoRA, whose update is no product:
            `compare` and `save_adapted` take that.
    """
    before = checkpoint_of(in_)
    given = [_read(one, before) for one in (adapter, other) if one is not None]
    changed = set().union(*(one.adapter.changed for one in given))
    names = [name for name in before.tensors if name in changed]
    where, rows = places(before.anatomy, names), []
    for name in names:
        place, stored = where[name], before.tensors[name]
        height, width = stored.matrix or (stored.entries, None)
        updates = [_updates(one, name) for one in given]
        row: dict[str, Any] = {
            "param_name": name,
            "address": place.address,
            "section": place.section,
            "layer_index": place.layer,
            "unified_index": place.unified,
            "component": place.component,
            "rows": height,
            "columns": width,
            "n": stored.entries,
        }
        row |= _of_one(given[0], name, updates[0])
        if other is not None:
            row |= _of_two([[one] if one is not None else [] for one in updates], stored.entries)
        rows.append(row)
    whole = dict.fromkeys(("layer_index", "unified_index", "columns"), "Int64")
    return pd.DataFrame(rows).astype(whole) if rows else pd.DataFrame()


def adapter_by_address(
    in_: Source,
    adapter: Source,
    other: Source | None = None,
    addresses: Sequence[Address | str] | None = None,
) -> pd.DataFrame:
    """One row per component that a LoRA adapter touches, down to heads: the rows of B and columns of A that it owns.

    Columns: address, section, layer_index, unified_index, part, index (as `by_address`); n (entries of the component,
    changed or not), fro_norm; with `other`, fro_norm_other, scalar_product, cosine and cosine_chance as in
    `adapter_table`. Addresses contain one another, so rows do not add up.

    Args:
        in_, adapter, other: as for `adapter_table`.
        addresses: e.g. `blocks.9-18.mlp`; by default all that `every_address` lists and one of the adapters touches.

    Raises:
        FrankenlensError: as `adapter_table`; or an address names nothing.
    """
    before = checkpoint_of(in_)
    given = [_read(one, before) for one in (adapter, other) if one is not None]
    slices = owned(before, every_address(before) if addresses is None else addresses)
    changed = set().union(*(one.adapter.changed for one in given))
    whole = {name: [_updates(one, name) for one in given] for name in before.tensors if name in changed}
    rows = []
    for address, pieces in slices.items():
        touched = [piece for piece in pieces if piece.parameter in whole]
        if not touched and addresses is None:
            continue
        n = sum(_entries(before, piece) for piece in pieces)
        parts = [[_piece(whole[one.parameter][k], one) for one in touched] for k in range(len(given))]
        row = labels(address, before) | {"n": n, "fro_norm": sum(map(_squares, parts[0])) ** 0.5}
        if other is not None:
            row |= _of_two(parts, n)
        rows.append(row)
    whole_numbers = dict.fromkeys(("layer_index", "unified_index", "index"), "Int64")
    return pd.DataFrame(rows).astype(whole_numbers) if rows else pd.DataFrame()


def _read(adapter: Source, before: Checkpoint) -> Adapted:
    found = adapter if isinstance(adapter, Adapted) else Adapted(before, str(adapter))
    if found.adapter.magnitudes:
        raise FrankenlensError(
            f"{found.folder} is an adapter of DoRA: every row is brought to a norm of its own, so that its update is "
            "not s B A. compare (--rl) takes it as it is, and `frankenlens merge` writes it out."
        )
    return found


def _updates(one: Adapted, name: str) -> _Update | None:
    """The update of a parameter: two thin matrices, or the difference itself; None where there is none."""
    adapter = one.adapter
    if name in adapter.updates:
        return adapter.updates[name]
    if name in adapter.offsets:
        return adapter.offsets[name].double()
    if name in adapter.replaced:
        before = one.in_.read(name).double()
        return (adapter.replaced[name].double() - before).view(one.tensors[name].matrix or (-1,))
    return None


def _piece(update: _Update | None, piece: WeightSlice) -> _Update | None:
    if isinstance(update, LowRank):
        return update.part(piece.dim, piece.start, piece.length)
    return update if update is None else piece.of(update)


def _squares(update: _Update | None) -> float:
    if update is None:
        return 0.0
    return update.squares() if isinstance(update, LowRank) else float(update.square().sum())


def _inner(one: _Update | None, two: _Update | None) -> float:
    if one is None or two is None:
        return 0.0
    if isinstance(one, LowRank):
        return one.inner(two) if isinstance(two, LowRank) else one.inner_dense(two)
    return two.inner_dense(one) if isinstance(two, LowRank) else float((one * two).sum())


def _of_one(one: Adapted, name: str, update: _Update | None) -> dict[str, Any]:
    kind = "bias" if name in one.adapter.offsets else "whole" if name in one.adapter.replaced else "product"
    row = dict.fromkeys(
        ("adapter_rank", "scaling", "rank", "spectral_norm", "stable_rank", "effective_rank"), np.nan
    )
    row |= {"kind": None if update is None else kind, "fro_norm": _squares(update) ** 0.5}
    if isinstance(update, LowRank):
        found = update.spectrum()
        row |= {"adapter_rank": update.rank, "scaling": update.scaling, "rank": update.n_directions()}
        row |= {"spectral_norm": float(found.values[0]), "stable_rank": found.stable_rank}
        row |= {"effective_rank": found.effective_rank}
    return row


def _of_two(parts: Sequence[Sequence[_Update | None]], n: int) -> dict[str, float]:
    sizes = [sum(map(_squares, some)) ** 0.5 for some in parts]
    product = sum(map(_inner, *parts)) if all(parts) else 0.0
    return {
        "fro_norm_other": sizes[1],
        "scalar_product": product,
        "cosine": product / (sizes[0] * sizes[1]) if all(sizes) else np.nan,
        "cosine_chance": chance(n),
    }


def _entries(before: Checkpoint, piece: WeightSlice) -> int:
    stored = before.tensors[piece.parameter]
    if piece.dim is None:
        return stored.entries
    rows, columns = stored.matrix or (stored.entries, 1)
    return piece.length * (columns if piece.dim == 0 else rows)
