"""Checkpoints that every process of a trainer wrote its part of: `model_world_size_8_rank_3.pt` (verl and its kin).

A tensor in such a file is the part that this rank held: a `DTensor`, whose mesh and placements say which part it is, a
`ShardedTensor`, which says it outright, or a whole tensor where nothing was distributed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hooks.errors import FrankenlensError, shown
from hooks.stored.entry import Entry, kind_of
from hooks.stored.pickles import StandIn, View, read_saved
from hooks.stored.tensors import Box, Reader, Stored, joined

RANKS = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_PART = 1 << 22  # bytes of two replicas that are compared at once


def rank_files(folder: Path) -> list[Path]:
    """The files of all ranks, in order; none where there are no such files.

    Raises:
        FrankenlensError: one is missing, or the files are of two saves.
    """
    found = {
        file: m for file in folder.glob("model_world_size_*_rank_*.pt") if (m := RANKS.fullmatch(file.name))
    }
    sizes = sorted({int(m[1]) for m in found.values()})
    if len(sizes) > 1:
        raise FrankenlensError(
            f"{folder} holds shards of {' and of '.join(map(str, sizes))} processes, of two saves; delete those that "
            "are not meant."
        )
    by_rank = {int(m[2]): file for file, m in found.items()}
    missing = [rank for rank in range(sizes[0] if sizes else 0) if rank not in by_rank]
    if missing:
        raise FrankenlensError(
            f"{folder}: the shards of {sizes[0]} processes are not all there: "
            f"model_world_size_{sizes[0]}_rank_{missing[0]}.pt is missing ({len(missing)} are). Every machine writes "
            "those of its own processes: copy them into one folder."
        )
    return [by_rank[rank] for rank in sorted(by_rank)]


def rank_entries(folder: Path) -> dict[str, Entry]:
    """Names and places of the tensors that all ranks together hold.

    Raises:
        FrankenlensError: a file is missing, holds what is no tensor, names code, or its parts do not make the whole.
    """
    files = rank_files(folder)
    saved = [_state(file) for file in files]
    for file, state in zip(files, saved, strict=True):
        if other := sorted(set(state) ^ set(saved[0])):
            raise FrankenlensError(
                f"{file.name} and {files[0].name} do not hold the same tensors ({other[0]} is in one of them); they "
                f"are of two saves: copy {folder} again, whole."
            )
    return {key: _entry(key, [state[key] for state in saved], files) for key in saved[0]}


def _state(file: Path) -> dict[str, Any]:
    """The tensors in a file by name."""
    state = read_saved(file)
    if not isinstance(state, Mapping):
        raise FrankenlensError(f"{file} holds {shown(state)}, not a state dict.")
    return {str(key): value for key, value in state.items() if isinstance(value, View) or _is_part(value)}


def _is_part(value: Any) -> bool:
    return isinstance(value, StandIn) and value.kind == "_rebuild_from_type_v2"


def _entry(key: str, parts: Sequence[Any], files: Sequence[Path]) -> Entry:
    where = f"{files[0].parent}"
    if all(isinstance(part, View) for part in parts):
        return _whole(key, parts, files)
    if any(isinstance(part, View) for part in parts):
        raise FrankenlensError(
            f"{where}: {key} is whole in one file and a part in another; they are of two saves."
        )
    boxes, shapes, dtypes = [], set(), set()
    for rank, (part, file) in enumerate(zip(parts, files, strict=True)):
        for offsets, local, shape in _located(key, part, rank, file):
            boxes.append(Box(offsets, local.shape, local.piece(key)))
            shapes.add(shape)
            dtypes.add(local.dtype)
    if len(shapes) != 1 or len(dtypes) != 1:
        told = ", ".join([*(str(list(one)) for one in shapes), *map(str, dtypes)]) or "nothing"
        raise FrankenlensError(
            f"{where}: the ranks do not agree on what {key} is ({told}); they are of two saves."
        )
    shape, dtype = shapes.pop(), dtypes.pop()
    return Entry(joined(key, boxes, shape, dtype.itemsize, where), shape, kind_of(dtype))


def _whole(key: str, parts: Sequence[View], files: Sequence[Path]) -> Entry:
    """A tensor that was not distributed: every rank has all of it, and the same."""
    first = Stored((parts[0].piece(key),), parts[0].shape, parts[0].dtype)
    for part, file in zip(parts[1:], files[1:], strict=True):
        if part.shape != first.shape or part.dtype != first.dtype or not _equal(first, part.piece(key)):
            raise FrankenlensError(
                f"{file}: {key} is not distributed, and is another tensor than in {files[0].name}; they are of two "
                "saves, or it was cut by hand: save the model gathered."
            )
    return Entry(first.pieces, first.shape, kind_of(first.dtype))


def _equal(one: Stored, other: Any) -> bool:
    size = sum(n for _, _, n in one.pieces)
    buffers = bytearray(min(size, _PART)), bytearray(min(size, _PART))
    with Reader(one) as left, Reader(Stored((other,), one.shape, one.dtype)) as right:
        for place in range(0, size, _PART):
            n = min(_PART, size - place)
            left.read(place, memoryview(buffers[0])[:n])
            right.read(place, memoryview(buffers[1])[:n])
            if buffers[0][:n] != buffers[1][:n]:
                return False
    return True


def _located(
    key: str, part: StandIn, rank: int, file: Path
) -> Iterator[tuple[tuple[int, ...], View, tuple[int, ...]]]:
    """Offsets, local tensor and whole shape of what a rank holds of a tensor."""
    try:
        _, kind, about, state = part.given
        shape = _sizes(about[2])
        if kind.__name__ == "ShardedTensor":
            for shard in state[0]:
                yield _sizes(shard.get("metadata").get("shard_offsets")), _local(shard.get("tensor")), shape
            return
        fields = state[1] if isinstance(state, tuple) else state
        local, spec = _local(fields["_local_tensor"]), fields["_spec"]
        meshed, placements = spec.get("mesh"), spec.get("placements")
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise FrankenlensError(f"{file}: {key} is distributed in a way that is not known.") from error
    yield _offsets(key, shape, placements, _coordinate(meshed, rank, file), file), local, shape


def _local(tensor: Any) -> View:
    if not isinstance(tensor, View):
        raise TypeError("no tensor")
    return tensor


def _sizes(given: Any) -> tuple[int, ...]:
    given = given.given[0] if isinstance(given, StandIn) else given
    return tuple(int(one) for one in given)


def _coordinate(mesh: StandIn, rank: int, file: Path) -> list[tuple[int, int]]:
    """Place and number of places along each axis of the mesh."""
    ranks = mesh.get("mesh")  # until PyTorch 2.8
    shape: tuple[int, ...] | None = None
    numbers: list[int] | None = None
    if isinstance(ranks, View):
        shape, numbers = ranks.shape, _numbers(ranks)
    elif isinstance(layout := mesh.get("_layout"), StandIn):
        shape, numbers = _laid_out(layout, mesh.get("_rank_map"))
    if shape is None or numbers is None or rank not in numbers:
        raise FrankenlensError(
            f"{file}: the mesh of processes is written in a way that is not known; save the model gathered, or with "
            "torch.distributed.checkpoint."
        )
    at, place = numbers.index(rank), []
    for size in reversed(shape):
        place.append((at % size, size))
        at //= size
    told = mesh.get("_coordinate_on_dim")
    if told is not None and [int(one) for one in told] != [one for one, _ in reversed(place)]:
        raise FrankenlensError(
            f"{file} was not written by rank {rank} but by another; it was renamed or copied over."
        )
    return place[::-1]


def _numbers(view: View) -> list[int]:
    found = Stored((view.piece("the mesh"),), view.shape, view.dtype).read()
    return [int(one) for one in found.flatten().to(torch.int64).tolist()]


def _laid_out(layout: StandIn, ranks: Any) -> tuple[tuple[int, ...], list[int]] | tuple[None, None]:
    """Shape of a mesh and its ranks in order, where it is written as strides over all of them."""
    axes = layout.get("axes")
    if axes is None:  # PyTorch 2.9 has them side by side
        given = (layout.get("shape"), layout.get("stride"))
        whole = [(one,) if isinstance(one, int) else tuple(one or ()) for one in given]
        pairs = list(zip(*whole, strict=True))
    else:
        pairs = [(axis.get("shape"), axis.get("stride")) for axis in axes]
    sides = [(_flattened(size), _flattened(stride)) for size, stride in pairs]
    if not sides or not isinstance(ranks, View):
        return None, None
    known, found = _numbers(ranks), [0]
    for size, stride in [one for some in sides for one in zip(*some, strict=True)]:
        found = [at + i * stride for at in found for i in range(size)]
    if max(found) >= len(known):
        return None, None
    return tuple(math.prod(size) for size, _ in sides), [known[at] for at in found]


def _flattened(given: Any) -> tuple[int, ...]:
    if isinstance(given, int):
        return (given,)
    return tuple(one for some in given or () for one in _flattened(some))


def _offsets(
    key: str, shape: tuple[int, ...], placements: Any, place: Sequence[tuple[int, int]], file: Path
) -> tuple[int, ...]:
    """Where a rank's part begins: axes are cut as `torch.chunk` cuts, one axis of the mesh after the other."""
    begin, size = [0] * len(shape), list(shape)
    if len(placements) != len(place):
        raise FrankenlensError(
            f"{file}: {key} has {len(placements)} placements on a mesh of {len(place)} axes."
        )
    for placement, (at, among) in zip(placements, place, strict=True):
        if placement.kind == "Replicate":
            continue
        axis = placement.get("dim", placement.given[0] if placement.given else None)
        if placement.kind != "Shard" or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
            raise FrankenlensError(
                f"{file}: {key} is placed as {placement.kind}, which is not read (Shard and Replicate are): save the "
                "model gathered, or with torch.distributed.checkpoint."
            )
        each = math.ceil(size[axis] / among)
        first = min(at * each, size[axis])
        begin[axis] += first
        size[axis] = min(each, size[axis] - first)
    return tuple(begin)
