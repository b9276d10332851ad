"""Checkpoints of `torch.distributed.checkpoint`: an index, `.metadata`, and `__0_0.distcp` with the parts of tensors.

Its own reader unpickles the index as it is, whatever stands in it; here both are read by `hooks.stored.pickles`, which
runs nothing. A part is looked up when its tensor is asked for, so that an optimizer's state costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hooks.errors import FrankenlensError, shown
from hooks.stored.entry import Entry, kind_of
from hooks.stored.inside import require_inside
from hooks.stored.pickles import StandIn, View, read_index, read_saved
from hooks.stored.tensors import Box, Piece, joined

INDEX = ".metadata"


def distributed_entries(folder: Path) -> dict[str, Entry]:
    """Names, shapes and types of every tensor in the folder; where they lie is looked up when it is asked for.

    Raises:
        FrankenlensError: names the file: the index names code, is damaged, or points out of the folder; a file is
            missing, or holds parts in a way that is not read.
    """
    index = folder / INDEX
    found = read_index(index)
    about, places = found.get("state_dict_metadata"), found.get("storage_data")
    if not isinstance(about, Mapping) or not isinstance(places, Mapping):
        raise FrankenlensError(f"{index} does not say which tensors there are, and where; copy it again.")
    by_name: dict[str, list[tuple[StandIn, StandIn]]] = {}
    for key, place in places.items():
        if not isinstance(key, StandIn) or not isinstance(place, StandIn):
            raise FrankenlensError(
                f"{index} says where tensors lie in a way that is not known: {shown(key)}."
            )
        by_name.setdefault(str(key.get("fqn")), []).append((key, place))
    require_inside(
        index, sorted({place.get("relative_path") for _, place in places_of(by_name)}, key=str), (".distcp",)
    )
    return {
        str(name): _entry(folder, str(name), one, by_name.get(str(name), []))
        for name, one in about.items()
        if isinstance(one, StandIn) and one.kind == "TensorStorageMetadata"
    }


def places_of(by_name: Mapping[str, list[tuple[StandIn, StandIn]]]) -> list[tuple[StandIn, StandIn]]:
    """Of all tensors together."""
    return [pair for pairs in by_name.values() for pair in pairs]


def _entry(folder: Path, name: str, about: StandIn, places: Sequence[tuple[StandIn, StandIn]]) -> Entry:
    properties = about.get("properties")
    try:
        shape = _sizes(about.get("size"))
        dtype = properties.get("dtype") or properties.whole[0]
        parts = {_sizes(one.get("offsets")): _sizes(one.get("sizes")) for one in about.get("chunks")}
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise FrankenlensError(f"{folder / INDEX} describes {name} in a way that is not known.") from error
    if not isinstance(dtype, torch.dtype):
        raise FrankenlensError(f"{folder / INDEX}: {name} is {shown(dtype)}, which is no type of a tensor.")

    def pieces() -> tuple[Piece, ...]:
        boxes = [_box(folder, name, key, place, parts, dtype) for key, place in places]
        return joined(name, boxes, shape, dtype.itemsize, str(folder))

    return Entry(pieces, shape, kind_of(dtype), folder / INDEX)


def _box(
    folder: Path,
    name: str,
    key: StandIn,
    place: StandIn,
    parts: Mapping[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
) -> Box:
    """One part of a tensor, as its file has it."""
    file = folder / str(place.get("relative_path"))
    if place.get("transform_descriptors"):
        how = ", ".join(map(str, place.get("transform_descriptors")))
        raise FrankenlensError(
            f"{file}: {name} was changed as it was written ({how}), which is not undone here."
        )
    if not file.is_file():
        raise FrankenlensError(
            f"{folder}: {INDEX} names {file.name}, which is missing. Every process writes its own: copy them into one "
            "folder."
        )
    offset, length = place.get("offset"), place.get("length")
    if not isinstance(offset, int) or not isinstance(length, int):
        raise FrankenlensError(
            f"{folder / INDEX} does not say where {name} lies in {file.name}; copy it again."
        )
    view = read_saved(file, offset, length)
    offsets = _sizes(key.get("offset") or ())
    wanted = parts.get(offsets)
    if not isinstance(view, View) or view.dtype != dtype or view.shape != wanted:
        there = f"{list(view.shape)} {view.dtype}" if isinstance(view, View) else shown(view)
        raise FrankenlensError(
            f"{file}: at {list(offsets)} of {name} it holds {there}, where {INDEX} says {wanted} {dtype}; the files "
            "are not of one save: copy the folder again, whole."
        )
    return Box(offsets, view.shape, view.piece(name))


def _sizes(given: Any) -> tuple[int, ...]:
    given = given.given[0] if isinstance(given, StandIn) and given.given else given
    given = () if isinstance(given, StandIn) else given
    return tuple(int(one) for one in given)
