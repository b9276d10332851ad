"""A checkpoint as files: names, shapes and types of its tensors, read part by part and never whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hooks.anatomy import Anatomy
from hooks.errors import FrankenlensError
from hooks.loading import auto_class
from hooks.processors import load_processor
from hooks.stored.names import Names
from hooks.unopened import unopened_anatomy
from interp.comparison.stored import Reader, Stored

PART = 1 << 20  # entries read at once: large enough for a disk's read-ahead, a few megabytes
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHOWN = 5


class Checkpoint:
    """A folder of safetensors files, one or many shards, opened without loading a weight.

    Names are those of the transformers model: older names on disk (`visual.`, `model.layers.`) are renamed, and experts
    that lie apart joined, as transformers does at loading. The model itself is built on the meta device, without
    weights.

    Attributes:
        folder: where it is.
        tensors: parameter name to where it lies, in the model's order; tied weights once.
        ties: parameter to the one it is tied to.
        ignored: names on disk that are no parameter of the model, which transformers does not load either.

    Raises:
        FrankenlensError: no such folder, no safetensors in it, a missing shard, missing weights, integer (quantized)
            weights, or a layout that transformers converts in other ways.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        files = _files(self.folder)
        parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters(remove_duplicate=False))
        names, found = Names(self.model), {}
        self.ties: dict[str, str] = {}
        self.ignored: list[str] = []
        apart: dict[str, dict[tuple[int, ...], Stored]] = {}
        for file in files:
            for key, stored in _header(file):
                name, order = names(key, stored.shape)
                if name in parameters and order is not None:
                    apart.setdefault(name, {})[order] = stored
                elif name in parameters:
                    self._require_shape(name, stored.shape, tuple(parameters[name].shape))
                    found[name] = stored
                else:
                    self.ignored.append(key)
        for name, parts in apart.items():
            found[name] = self._joined(name, parts, tuple(parameters[name].shape))
        self.ties = self._tie(found)
        absent = [name for name in parameters if name not in found and name not in self.ties]
        if absent:
            raise FrankenlensError(
                f"{self.folder}: {len(absent)} weights of {type(self.model).__name__} are not in its files: "
                f"{', '.join(absent[:SHOWN])}; download or save it again, whole."
            )
        self.tensors: dict[str, Stored] = {name: found[name] for name in parameters if name in found}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model without weights, on the meta device."""
        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
            with torch.device("meta"):
                return auto_class(config).from_config(config)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0]
            raise FrankenlensError(f"{self.folder}: no language model that is known: {first}") from error

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the model's parts are."""
        try:
            processor = load_processor(self.folder, local_files_only=True)
        except (
            FrankenlensError
        ):  # weights alone: see `unopened_anatomy` for what is then known of a vision tower
            processor = None
        return unopened_anatomy(self.model, processor)

    def parts(self, name: str, entries: int = PART) -> Iterator[Shaped[Tensor, " entry"]]:
        """One tensor, flat and in its own type, in parts of `entries`; each part is overwritten by the next."""
        stored = self._stored(name)
        buffer, size = torch.empty(min(entries, stored.entries), dtype=stored.dtype), stored.dtype.itemsize
        with Reader(stored, ahead=True) as reader:
            for first in range(0, stored.entries, entries):
                part = buffer[: min(entries, stored.entries - first)]
                reader.read(first * size, _bytes(part))
                yield part

    def blocks(self, name: str, entries: int = PART) -> Iterator[Shaped[Tensor, "long short"]]:
        """A matrix in blocks along its longer side, of about `entries` numbers; each is overwritten by the next.

        One that is wider than tall comes as its transpose, so that blocks are always parts of the longer side.
        """
        stored = self._stored(name)
        rows, columns = stored.matrix or (stored.entries, 1)
        if rows >= columns:
            for part in self.parts(name, columns * max(1, entries // columns)):
                yield part.view(-1, columns)
            return
        width = min(columns, max(1, entries // rows))
        buffer, size = torch.empty(rows * width, dtype=stored.dtype), stored.dtype.itemsize
        with Reader(stored) as reader:
            for first in range(0, columns, width):
                n = min(width, columns - first)
                part = buffer[: rows * n].view(rows, n)
                view = _bytes(part)
                for row in range(rows):
                    reader.read((row * columns + first) * size, view[row * n * size : (row + 1) * n * size])
                yield part.T

    def sample(self, name: str, runs: int, length: int) -> Shaped[Tensor, " entry"]:
        """Evenly spaced runs of neighbouring entries of a tensor; all of it where it has no more than that."""
        stored = self._stored(name)
        if stored.entries <= runs * length:
            return self.read(name).flatten()
        found = torch.empty(runs, length, dtype=stored.dtype)
        with Reader(stored) as reader:
            for run, first in zip(
                found, np.linspace(0, stored.entries - length, runs).astype(int), strict=True
            ):
                reader.read(int(first) * stored.dtype.itemsize, _bytes(run))
        return found.flatten()

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """One tensor, whole, in its own shape and type."""
        stored = self._stored(name)
        return next(self.parts(name, max(1, stored.entries))).view(stored.shape)

    def weights_sha256(self) -> str:
        """What `interp.pair.weights_sha256` gives of the loaded model, from the files (about a second per 2 GB)."""
        digest = hashlib.sha256()
        for name in sorted({*self.tensors, *self.ties}):
            source = self.ties.get(name, name)
            stored = self.tensors[source]
            digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            for part in self.parts(source):
                digest.update(_bytes(part))
        return digest.hexdigest()

    def provenance(self) -> dict[str, str]:
        """Name, class, type and hash of the weights, as `Pair.provenance` gives them."""
        types = sorted({str(stored.dtype) for stored in self.tensors.values()})
        return {
            "name_or_path": str(self.folder),
            "class": type(self.model).__name__,
            "dtype": ", ".join(types),
            "weights_sha256": self.weights_sha256(),
        }

    def _joined(self, name: str, parts: Mapping[tuple[int, ...], Stored], wanted: tuple[int, ...]) -> Stored:
        """One tensor whose parts lie apart on disk (each expert's), as transformers lays them behind one another."""
        ordered = [parts[order] for order in sorted(parts)]
        types = {one.dtype for one in ordered}
        rows = sum(one.shape[0] for one in ordered)
        if len(types) > 1 or rows != wanted[0] * wanted[1] or any(o.shape[1:] != wanted[2:] for o in ordered):
            shapes = ", ".join(dict.fromkeys(f"{list(one.shape)} {one.dtype}" for one in ordered))
            raise FrankenlensError(
                f"{self.folder}: {len(ordered)} parts of {name}, {shapes}, do not make {list(wanted)}; download or "
                "save it again, whole."
            )
        return Stored(tuple(piece for one in ordered for piece in one.pieces), wanted, types.pop())

    def _require_shape(self, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if stored != wanted:
            raise FrankenlensError(
                f"{self.folder}: {name} is {list(stored)} in the file but {list(wanted)} by config.json; the files "
                "are not of one checkpoint."
            )

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


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FrankenlensError(
            f"{folder} is no folder; give a local checkpoint folder with config.json in it (a repository is "
            "downloaded by `hf download OWNER/NAME --local-dir FOLDER`)."
        )
    if (folder / "adapter_config.json").is_file():
        raise FrankenlensError(
            f"{folder} is a PEFT adapter, not a checkpoint: merge it (merge_and_unload) and save the whole model, or "
            "the update cannot be read from its files."
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
            f"{folder}: {index.name} names {', '.join(missing[:SHOWN])}, which is missing; download it again."
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
        size = about["data_offsets"][1] - about["data_offsets"][0]
        yield key, Stored(((file, start, size),), tuple(about["shape"]), _DTYPES[about["dtype"]])


def _bytes(part: Shaped[Tensor, "..."]) -> memoryview:
    flat: Any = part.view(-1).view(torch.uint8).numpy()
    return memoryview(flat).cast("B")
