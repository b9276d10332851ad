"""A checkpoint as files: names, shapes and types of its tensors, read part by part and never whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from hooks.anatomy import Anatomy, find_anatomy
from hooks.errors import FrankenlensError
from interp.comparison.names import Names

PART = 1 << 20  # entries read at once: large enough for a disk's read-ahead, a few megabytes
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 5


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: file, first byte, shape and type."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int] | None:
        """Rows and columns of the linear map (a convolution's kernel is flattened to columns); None for a vector."""
        return (self.shape[0], math.prod(self.shape[1:])) if len(self.shape) > 1 else None


class Checkpoint:
    """A folder of safetensors files, one or many shards, opened without loading a weight.

    Names are those of the transformers model: older names on disk (`visual.`, `model.layers.`) are renamed as
    transformers does at loading. The model itself is built on the meta device, without weights.

    Attributes:
        folder: where it is.
        tensors: parameter name to where it lies, in the model's order; tied weights once.
        ties: parameter to the one it is tied to.
        ignored: names on disk that are no parameter of the model, which transformers does not load either.

    Raises:
        FrankenlensError: no such folder, no safetensors in it, a missing shard, missing weights, integer (quantized)
            weights, or a layout that transformers converts rather than renames.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        files = _files(self.folder)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names, found = Names(self.model), {}
        self.ignored: list[str] = []
        for file in files:
            for key, stored in _header(file):
                name = names(key)
                if name in parameters:
                    found[name] = stored
                else:
                    self.ignored.append(key)
        self.ties = self._tie(found)
        absent = [name for name in parameters if name not in found and name not in self.ties]
        if absent:
            raise FrankenlensError(
                f"{self.folder}: {len(absent)} weights of {type(self.model).__name__} are not in its files: "
                f"{', '.join(absent[:_SHOWN])}; download or save it again, whole."
            )
        self.tensors: dict[str, Stored] = {name: found[name] for name in parameters if name in found}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model without weights, on the meta device."""
        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
            with torch.device("meta"):
                return AutoModelForImageTextToText.from_config(config)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0]
            raise FrankenlensError(f"{self.folder}: not an image-text-to-text model: {first}") from error

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the model's parts are."""
        return find_anatomy(self.model)

    def parts(self, name: str, entries: int = PART) -> Iterator[Shaped[Tensor, " entry"]]:
        """One tensor, flat and in its own type, in parts of `entries`; each part is overwritten by the next."""
        stored = self._stored(name)
        buffer = torch.empty(min(entries, stored.entries), dtype=stored.dtype)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            for first in range(0, stored.entries, entries):
                part = buffer[: min(entries, stored.entries - first)]
                _read_into(file, part)
                yield part

    def rows(self, name: str, entries: int = PART) -> Iterator[Shaped[Tensor, "row column"]]:
        """A matrix in blocks of whole rows, about `entries` numbers each; each block is overwritten by the next."""
        rows, columns = self._stored(name).matrix or (1, self._stored(name).entries)
        for part in self.parts(name, columns * min(rows, max(1, entries // columns))):
            yield part.view(-1, columns)

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """One tensor, whole, in its own shape and type."""
        stored = self._stored(name)
        return next(self.parts(name, max(1, stored.entries))).view(stored.shape)

    def matrix(self, name: str) -> Float[Tensor, "row column"]:
        """One tensor as a matrix (`Stored.matrix`), whole."""
        stored = self._stored(name)
        return self.read(name).view(stored.matrix or (1, stored.entries))

    def _stored(self, name: str) -> Stored:
        if name in self.ties:
            raise FrankenlensError(f"{name} is tied to {self.ties[name]}, one tensor: ask for that.")
        if name not in self.tensors:
            raise FrankenlensError(f"{self.folder} has no parameter {name!r}; see Checkpoint.tensors.")
        return self.tensors[name]

    def _tie(self, found: dict[str, Stored]) -> dict[str, str]:
        """As transformers ties: whichever of two is stored serves both; stored twice and different, they are two."""
        ties: dict[str, str] = {}
        self.tensors = found
        for target, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if target in found and source not in found:
                found[source] = found.pop(target)
            elif target in found and not self._equal(target, source):
                parent, _, leaf = target.rpartition(".")
                own = torch.empty(found[target].shape, device="meta")
                self.model.get_submodule(parent).register_parameter(leaf, nn.Parameter(own))
                continue
            found.pop(target, None)
            ties[target] = source
        return ties

    def _equal(self, one: str, other: str) -> bool:
        if self.tensors[one].shape != self.tensors[other].shape:
            return False
        pairs = zip(self.parts(one), self.parts(other), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def align(*checkpoints: Checkpoint) -> list[str]:
    """The parameters that the checkpoints share, in the model's order.

    Raises:
        FrankenlensError: their names, shapes or ties differ; names the first differences.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        differences = list(_differences(first, other))
        if differences:
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise FrankenlensError(
                f"{first.folder} and {other.folder} do not align: {'; '.join(differences[:_SHOWN])}{more}. "
                "Compare checkpoints of one architecture, with equal vocabularies and the same weights tied "
                "(save both with save_pretrained from one class and config)."
            )
    return list(first.tensors)


def _differences(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    for one, two in ((first, other), (other, first)):
        for name in one.tensors:
            if name in two.ties:
                yield f"{name} is tied to {two.ties[name]} in {two.folder} but has its own weights in {one.folder}"
            elif name not in two.tensors:
                yield f"{name} is only in {one.folder}"
    for name, stored in first.tensors.items():
        if name in other.tensors and other.tensors[name].shape != stored.shape:
            shapes = [list(shape) for shape in (stored.shape, other.tensors[name].shape)]
            yield f"{name} is {shapes[0]} in {first.folder} but {shapes[1]} in {other.folder}"


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FrankenlensError(
            f"{folder} is no folder; give a local checkpoint folder with config.json in it."
        )
    if not (folder / "config.json").is_file():
        raise FrankenlensError(
            f"{folder}: no config.json, so this is no checkpoint written by save_pretrained."
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = (
            f"only pickle files ({', '.join(pickles)})" if pickles else "no model.safetensors and no index"
        )
        raise FrankenlensError(
            f"{folder}: {found}. Only safetensors are read: load it once in a place you trust and call "
            "model.save_pretrained(folder)."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FrankenlensError(
            f"{folder}: {index.name} names {', '.join(missing[:_SHOWN])}, which is missing; download it again."
        )
    return [folder / name for name in names]


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    """Names and places of a file's tensors (https://huggingface.co/docs/safetensors); safetensors checks the file."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except Exception as error:  # safetensors raises a class of its own
        raise FrankenlensError(
            f"{file} cannot be read as safetensors: {error}; download it again."
        ) from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for key, about in header.items():
        if about["dtype"] not in _DTYPES:
            raise FrankenlensError(
                f"{file}: {key} is {about['dtype']}; only {', '.join(_DTYPES)} are compared, so save it unquantized."
            )
        start = 8 + length + about["data_offsets"][0]
        yield key, Stored(file, start, tuple(about["shape"]), _DTYPES[about["dtype"]])


def _read_into(file: Any, part: Shaped[Tensor, " entry"]) -> None:
    view = memoryview(part.view(torch.uint8).numpy()).cast("B")
    done = 0
    while done < len(view):
        n = file.readinto(view[done:])
        if not n:
            raise FrankenlensError(f"{file.name} ends before its last tensor does; download it again.")
        done += n
