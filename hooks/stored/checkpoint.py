"""A checkpoint as files: names, shapes and types of its tensors, read part by part and never whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hooks.anatomy import Anatomy
from hooks.errors import FrankenlensError, one_line
from hooks.loading import auto_class
from hooks.processors import load_processor
from hooks.stored.entry import DTYPES, Entry
from hooks.stored.files import SHOWN, require_one_precision, require_shape
from hooks.stored.inventory import Inventory
from hooks.stored.layouts import layout_of
from hooks.stored.names import Names
from hooks.stored.settings import require_sound_settings
from hooks.stored.tensors import Reader, Stored, as_bytes
from hooks.stored.wrapped import is_wrapped, unwrapped
from hooks.unopened import unopened_anatomy

PART = 1 << 20  # entries read at once: large enough for a disk's read-ahead, a few megabytes


class Checkpoint:
    """A checkpoint in whatever layout it was left (`hooks.stored.layouts`), opened without loading a weight.

    Names are those of the transformers model: older names on disk (`visual.`, `model.layers.`) are renamed, and experts
    that lie apart joined, as transformers does at loading. The model itself is built on the meta device, without
    weights.

    Args:
        folder: where it is.
        settings: folder or repository whose config.json and tokenizer are taken where the checkpoint has none, as the
            shards of a trainer.

    Attributes:
        folder: where it is.
        layout: how it lies there.
        keys: name in the model to its names on disk, with their places among its parts and their shapes.
        tensors: name in the model's state dict to where it lies, in its order: weights and the buffers that are saved
            with them, such as the biases that balance experts; tied weights once.
        ties: name to the one it is tied to.
        counters: the same as `tensors` of whole numbers, which are carried along and not compared.
        ignored: names on disk that are none of the model's, which transformers does not load either.

    Raises:
        FrankenlensError: no such folder, no checkpoint in it, two of them, a missing shard, a pickle that names code,
            missing weights, quantized weights, or a layout that transformers converts in other ways.
    """

    def __init__(self, folder: Path | str, settings: Path | str | None = None) -> None:
        self.folder = Path(folder)
        self.layout = layout_of(self.folder, settings=settings)
        stored = self.layout.read()
        require_sound_settings(self.layout.settings, len(stored))
        self.ignored: list[str] = []
        if not self.layout.is_plain or is_wrapped(stored):
            stored, self.ignored = unwrapped(stored, self.model, self.folder)
        require_one_precision(self.layout.settings, stored)
        wanted: dict[str, Tensor] = self.model.state_dict()
        self.ties: dict[str, str] = {}
        self.keys: dict[str, list[tuple[tuple[int, ...], str, tuple[int, ...]]]] = {}
        found = self._found(stored, wanted)
        self.counters = {
            name: found.pop(name) for name in wanted if name in found and not _is_weight(wanted[name])
        }
        self.ties = self._tie(found)
        absent = [name for name in wanted if name not in found | self.counters | self.ties]
        absent = [name for name in absent if not self._is_made(name)]
        if absent:
            raise FrankenlensError(
                f"{self.folder}: {len(absent)} weights of {type(self.model).__name__} are not in its files: "
                f"{', '.join(absent[:SHOWN])}; download or save it again, whole."
            )
        self.tensors: dict[str, Stored] = {name: found[name] for name in wanted if name in found}

    def _found(self, stored: Mapping[str, Entry], wanted: Mapping[str, Tensor]) -> dict[str, Stored]:
        """Name in the model to where it lies, of everything in the files that is in the model."""
        names, found = Names(self.model), {}
        apart: dict[str, dict[tuple[int, ...], Stored]] = {}
        for key, entry in stored.items():
            name, order = names(key, entry.shape)
            if name not in wanted:
                self.ignored.append(key)
                continue
            if entry.kind not in DTYPES or (_is_weight(wanted[name]) != DTYPES[entry.kind].is_floating_point):
                raise FrankenlensError(
                    f"{entry.file}: {key} is {entry.kind}; weights are compared in floating point (F64, F32, F16, "
                    "BF16), so save it unquantized."
                )
            piece = entry.stored
            parts = [] if order is None else self.keys.get(name, [])
            self.keys[name] = sorted([*parts, (order or (), key, entry.shape)])
            if order is not None:
                apart.setdefault(name, {})[order] = piece
            else:
                require_shape(self.folder, name, entry.shape, tuple(wanted[name].shape))
                found[name] = piece
        for name, parts in apart.items():
            found[name] = self._joined(name, parts, tuple(wanted[name].shape))
        return found

    def _is_made(self, name: str) -> bool:
        """Whether transformers makes a buffer anew where a file lacks it."""
        made = self.model._keys_to_ignore_on_load_missing or ()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return name not in parameters and any(re.search(pattern, name) for pattern in made)

    @cached_property
    def inventory(self) -> Inventory:
        """Names, shapes and ties, as of a model in memory; types are compared in the wider."""
        shapes = {name: stored.shape for name, stored in (self.tensors | self.counters).items()}
        shapes |= {name: shapes[source] for name, source in self.ties.items()}
        return Inventory(shapes, {}, Inventory.of(self.model).ties)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model without weights, on the meta device."""
        try:
            config = AutoConfig.from_pretrained(
                self.layout.settings, local_files_only=True, trust_remote_code=False
            )
            with torch.device("meta"):
                return auto_class(config).from_config(config)
        except Exception as error:  # a configuration can make transformers raise anything
            raise FrankenlensError(
                f"{self.folder}: no language model that is known: {one_line(error)}"
            ) from error

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the model's parts are."""
        try:
            processor = load_processor(self.layout.processor, local_files_only=True)
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
                reader.read(first * size, as_bytes(part))
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
                view = as_bytes(part)
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
                reader.read(int(first) * stored.dtype.itemsize, as_bytes(run))
        return found.flatten()

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """One tensor, whole, in its own shape and type."""
        stored = self._stored(name)
        return next(self.parts(name, max(1, stored.entries))).view(stored.shape)

    def weights_sha256(self) -> str:
        """What `interp.pair.weights_sha256` gives of the loaded model, from the files (about a second per 2 GB)."""
        digest = hashlib.sha256()
        for name in sorted({*self.tensors, *self.counters, *self.ties}):
            source = self.ties.get(name, name)
            stored = self._stored(source)
            digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            for part in self.parts(source):
                digest.update(as_bytes(part))
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

    def _stored(self, name: str) -> Stored:
        if name in self.ties:
            raise FrankenlensError(f"{name} is tied to {self.ties[name]}, one tensor: ask for that.")
        found = self.tensors.get(name) or self.counters.get(name)
        if found is None:
            raise FrankenlensError(f"{self.folder} has no tensor {name!r}; see Checkpoint.tensors.")
        return found

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


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
