"""What training started from, and how far weights are from it: read from files tensor by tensor, or kept in memory."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from hooks.errors import FrankenlensError
from hooks.weights import WeightSlice
from interp.comparison import Checkpoint

_IN_CACHE, _ON_DEVICE = 1 << 17, 1 << 24
"""Entries that are worked on at once: on a CPU as many as its cache holds."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Sums:
    """Of a piece of a parameter.

    Attributes:
        update, before: squared norms of what changed, and of the reference.
        changed: entries whose bits differ.
        n: entries.
    """

    update: float
    before: float
    changed: int
    n: int


@runtime_checkable
class Reference(Protocol):
    """Weights that others are compared with."""

    @property
    def kept_bytes(self) -> int:
        """Main memory that it takes."""
        ...

    def sums(self, parameters: Mapping[str, nn.Parameter]) -> dict[WeightSlice, Sums]:
        """How far the parameters are from it, piece by piece."""
        ...


class Copied:
    """A copy in main memory, in the weights' own types: of whole tensors, or of pieces where only these are watched.

    Args:
        parameters: name to parameter.
        pieces: what is watched.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], pieces: Iterable[WeightSlice]) -> None:
        self._kept: dict[WeightSlice, Tensor] = {}
        for name, some in _by_name(pieces).items():
            parameter = parameters[name].detach()
            whole = next((piece for piece in some if piece.dim is None), None)
            if whole is not None:
                self._kept[whole] = parameter.to("cpu", copy=True)
            for piece in some:
                kept = None if whole is None else self._kept[whole]
                own = piece.of(parameter).to("cpu", copy=True) if kept is None else piece.of(kept)
                self._kept.setdefault(piece, own)

    def __str__(self) -> str:
        return "the copy of the weights"

    @property
    def kept_bytes(self) -> int:
        """Main memory that it takes; pieces that share a tensor are counted once."""
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in self._kept.values()}
        return sum(one.nbytes() for one in storages.values())

    def sums(self, parameters: Mapping[str, nn.Parameter]) -> dict[WeightSlice, Sums]:
        """See `Reference`."""
        return {
            piece: _sums(piece.of(parameters[piece.parameter].detach()), kept)
            for piece, kept in self._kept.items()
        }


class OnDisk:
    """A checkpoint's files, read anew each time, one tensor at a time.

    Args:
        checkpoint: the files.
        pieces: what is watched.
    """

    kept_bytes = 0

    def __init__(self, checkpoint: Checkpoint, pieces: Iterable[WeightSlice]) -> None:
        self._checkpoint, self._pieces = checkpoint, _by_name(pieces)

    def __str__(self) -> str:
        return str(self._checkpoint.folder)

    def sums(self, parameters: Mapping[str, nn.Parameter]) -> dict[WeightSlice, Sums]:
        """See `Reference`; what is stored in another type than the weights is cast to theirs, as at loading."""
        found = {}
        for name, pieces in self._pieces.items():
            parameter = parameters[name].detach()
            before = self._checkpoint.read(self._checkpoint.ties.get(name, name)).to(parameter.dtype)
            found |= {piece: _sums(piece.of(parameter), piece.of(before)) for piece in pieces}
        return found


def on_disk(given: str | Path | None, model: Any, pieces: Iterable[WeightSlice]) -> OnDisk:
    """The files of the checkpoint that a model was loaded from, or of another.

    Raises:
        FrankenlensError: there are none, or they are not those of this model.
    """
    pieces, folder = list(pieces), Path(given) if given is not None else _loaded_from(model)
    checkpoint = Checkpoint(folder)
    parameters = dict(model.named_parameters())
    for name in {piece.parameter for piece in pieces}:
        stored = checkpoint.tensors.get(checkpoint.ties.get(name, name))
        if stored is None or stored.shape != tuple(parameters[name].shape):
            there = "not there" if stored is None else list(stored.shape)
            raise FrankenlensError(
                f"{folder}: {name} is {there}, and {list(parameters[name].shape)} in the model that is trained; give "
                "reference= the folder of the checkpoint that the model was made of, or reference='copy'."
            )
    return OnDisk(checkpoint, pieces)


def squares(part: Shaped[Tensor, "..."]) -> float:
    """The sum of squares, in float64, some entries at a time."""
    return sum(float(one.square().sum(dtype=torch.float64)) for (one,) in _chunks(part))


@torch.no_grad()
def _sums(now: Shaped[Tensor, "..."], before: Shaped[Tensor, "..."]) -> Sums:
    update = reference = 0.0
    changed, kind = 0, _BITS[now.element_size()]
    for one, other in _chunks(now, before, wide=False):
        other = other.to(one.device)
        changed += int((one.view(kind) != other.view(kind)).sum())
        wide, old = one.to(_wide(one)), other.to(_wide(one))
        update += float((wide - old).square().sum(dtype=torch.float64))
        reference += float(old.square().sum(dtype=torch.float64))
    return Sums(update, reference, changed, now.numel())


def _chunks(*tensors: Shaped[Tensor, "..."], wide: bool = True) -> Iterable[tuple[Tensor, ...]]:
    """Parts of tensors of one shape along their first axis, contiguous."""
    first = tensors[0]
    entries = _IN_CACHE if first.device.type == "cpu" else _ON_DEVICE
    rows = max(1, entries // max(1, first[0].numel())) if first.ndim and len(first) else 1
    for parts in zip(*((one if first.ndim else one[None]).split(rows) for one in tensors), strict=True):
        yield tuple((one.to(_wide(one)) if wide else one).contiguous() for one in parts)


def _wide(tensor: Shaped[Tensor, "..."]) -> torch.dtype:
    return torch.promote_types(torch.float32, tensor.dtype)


def _by_name(pieces: Iterable[WeightSlice]) -> dict[str, list[WeightSlice]]:
    found: dict[str, list[WeightSlice]] = defaultdict(list)
    for piece in pieces:
        found[piece.parameter].append(piece)
    return found


def _loaded_from(model: Any) -> Path:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if name and os.path.isdir(name):
        return Path(name)
    if name:
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name of a repository
            cached = None
        if isinstance(cached, str):
            return Path(cached).parent
    raise FrankenlensError(
        f"the model was loaded from {name or 'nowhere that it remembers'}, which is no folder here, so the weights "
        "that it starts from are not at hand: give reference= the folder of that checkpoint, or reference='copy' to "
        "keep a copy of the watched weights in main memory."
    )
