"""An adapter merged into a whole checkpoint, tensor by tensor: the files of IN again, the adapter in their weights.

Not a merge of several models (`interp.transfer.merging`), and not the merge in memory that a `Pair` makes
(`interp.pair.adapter`), by which this one is proved.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Shaped
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from hooks.errors import FrankenlensError
from hooks.extras import require_installed
from hooks.loading import load_model
from hooks.processors import load_processor
from hooks.selfcheck import opening_inputs
from hooks.selfcheck_writes import tolerance
from hooks.stored.checkpoint import PART
from hooks.stored.files import DTYPES, Entry, entries, weight_files
from hooks.stored.names import Names
from hooks.stored.tensors import Reader
from interp.comparison import Adapted, Checkpoint
from interp.pair.adapter import LOST, ROUNDING, adapted_logits, read_adapter, undisturbed_logits
from interp.results.files import is_occupied, publishing
from interp.transfer.merging import copy_settings, set_dtype
from interp.updates import dot, type_name

_WRONG = 0.05  # how far what was written may be from the adapted model, of how far that is from IN
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class AdaptedReport:
    """What was written.

    Attributes:
        folder: the checkpoint.
        changed: how many of its tensors the adapter changed.
        lost: the share of the update's norm that their type does not hold.
        off, moved: of the proof, on a prompt in float32: the largest difference of its logits to those of IN under
            PEFT's own adapter, and of these to IN's; None where it was not asked for.
    """

    folder: Path
    changed: int
    lost: float
    off: float | None = None
    moved: float | None = None


def save_adapted(
    in_: Path | str,
    adapter: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    accept: Sequence[str] = (),
    prove: bool = True,
    progress: bool = True,
) -> AdaptedReport:
    """Write the checkpoint that IN is with an adapter; all of it or nothing.

    Files, names and types are those of IN, as are configuration, tokenizer, processor and chat template. Each tensor is
    W + s B A in float32 (DoRA: with its rows' magnitudes), rounded once. At most a part of one tensor is in memory,
    but for the proof, which opens IN under PEFT's adapter and then what was written, one after the other, in float32.

    Args:
        in_: the folder of the model that the adapter was trained on.
        adapter: the folder of a LoRA adapter.
        out: a folder that does not exist or is empty.
        dtype: "float32" to store all weights in it; by default each in its own type.
        accept: holds "rounding" where a type that loses more than 5 % of the update is wanted all the same.
        prove: whether the logits of what was written are compared with PEFT's.
        progress: a bar.

    Raises:
        FrankenlensError: a folder is not what it should be; `out` is not empty; too much of the update is lost to
            rounding; or what was written computes something else. Nothing is left behind then.
        MissingPackage: `prove` without peft.
    """
    out, adapter = Path(out), Path(adapter)
    if prove:
        require_installed("the proof of a merged adapter", "peft")
    if dtype not in (None, "float32"):
        raise FrankenlensError(f'dtype={dtype!r}: give "float32", or nothing for the types of IN')
    if unknown := sorted(set(accept) - {ROUNDING}):
        raise FrankenlensError(f"accept={unknown}: {ROUNDING!r} is all that a merge takes")
    if is_occupied(out):
        raise FrankenlensError(f"{out} is not empty; choose another folder for the merged checkpoint")
    made = Adapted(Checkpoint(in_), adapter)
    if not made.in_.layout.is_plain:
        raise FrankenlensError(
            f"{in_} holds {made.in_.layout.kind}; an adapter is merged into IN's own safetensors files. Save IN with "
            "save_pretrained first."
        )
    with publishing(out) as staging:
        writing = _Writing(made, torch.float32 if dtype else None)
        for file in tqdm(weight_files(made.in_.folder), desc="merging", unit="file", disable=not progress):
            writing.write(file, staging / file.name)
        lost = writing.lost
        _require_held(adapter, lost, writing.coarse, accept)
        copy_settings(made.in_.layout, staging)
        writing.write_index(made.in_.folder, staging)
        if dtype is not None:
            set_dtype(staging / "config.json", dtype)
        off, moved = _proved(made.in_.folder, adapter, staging, lost, progress) if prove else (None, None)
        about = {
            "in": made.in_.folder.name,
            "adapter": adapter.name,
            "lost": lost,
            "off": off,
            "moved": moved,
        }
        (staging / "merge.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return AdaptedReport(out, len(made.adapter.changed), lost, off, moved)


class _Writing:
    """Safetensors files again, with other numbers in some tensors.

    Args:
        made: IN and the adapter.
        dtype: of all weights that are written; None: their own.
    """

    def __init__(self, made: Adapted, dtype: torch.dtype | None) -> None:
        self._made, self._dtype, self._names = made, dtype, Names(made.model)
        self._lost = self._updated = 0.0
        self._size = 0
        self.coarse = torch.float32

    @property
    def lost(self) -> float:
        """The share of the update's norm that rounding has taken."""
        return (self._lost / self._updated) ** 0.5 if self._updated else 0.0

    def write(self, source: Path, target: Path) -> None:
        """One file (https://huggingface.co/docs/safetensors): a header, and the tensors in its order."""
        stored = dict(sorted(entries(source).items(), key=lambda item: item[1].pieces[0][1]))
        with safe_open(source, framework="pt") as opened:
            about = opened.metadata()
        header: dict[str, Any] = {} if about is None else {"__metadata__": about}
        place = 0
        for key, entry in stored.items():
            kind = self._kind(entry)
            size = entry.size // DTYPES[entry.kind].itemsize * kind.itemsize
            header[key] = {
                "dtype": _KINDS[kind],
                "shape": list(entry.shape),
                "data_offsets": [place, place + size],
            }
            place += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._size += place
        with target.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key, entry in tqdm(stored.items(), desc=source.name, unit="tensor", leave=False, delay=2):
                self._write_tensor(file, key, entry)

    def write_index(self, source: Path, target: Path) -> None:
        """The index of several files, with their size."""
        for path in source.glob("*.safetensors.index*.json"):
            shutil.copyfile(path, target / path.name)
            index = json.loads((target / path.name).read_text(encoding="utf-8"))
            index.setdefault("metadata", {})["total_size"] = self._size
            (target / path.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _kind(self, entry: Entry) -> torch.dtype:
        own = DTYPES[entry.kind]
        return self._dtype if self._dtype is not None and own.is_floating_point else own

    def _write_tensor(self, file: BinaryIO, key: str, entry: Entry) -> None:
        name, order = self._names(key, entry.shape)
        kind, made = self._kind(entry), self._made
        if name in made.adapter.changed:
            pairs = zip(made.in_.parts(name), made.parts(name), strict=True)
            for before, exact in pairs if order is None else [self._part(name, key, entry)]:
                rounded = exact.to(kind)
                self._count(before, exact, rounded)
                file.write(_bytes(rounded))
            self.coarse = max(self.coarse, kind, key=lambda one: torch.finfo(one).eps)
            return
        for part in _parts(entry):
            file.write(_bytes(part.to(kind)))

    def _part(self, name: str, key: str, entry: Entry) -> tuple[Shaped[Tensor, " n"], Shaped[Tensor, " n"]]:
        """What lies apart on disk (an expert's matrix) of a tensor that the adapter holds whole: before and after."""
        adapter, before = self._made.adapter, entry.stored.read().flatten()
        if name not in adapter.replaced:
            raise FrankenlensError(
                f"{adapter.folder}: it changes {name}, which {self._made.in_.folder} stores in parts ({key}): save IN "
                "with save_pretrained(folder, save_original_format=False) first."
            )
        sizes = {other: math.prod(shape) for _, other, shape in self._made.in_.keys[name]}
        first = sum(sizes[other] for other in list(sizes)[: list(sizes).index(key)])
        exact = adapter.replaced[name].flatten()[first : first + len(before)]
        return before, exact.to(self._made.tensors[name].dtype)

    def _count(
        self, before: Shaped[Tensor, " n"], exact: Shaped[Tensor, " n"], rounded: Shaped[Tensor, " n"]
    ) -> None:
        missing, update = rounded.to(exact) - exact, exact - before.to(exact)
        self._lost += dot(missing, missing)
        self._updated += dot(update, update)


def _parts(entry: Entry) -> Iterator[Shaped[Tensor, " entry"]]:
    """A tensor of a file as it lies there, part by part."""
    stored = entry.stored
    buffer, size = torch.empty(min(PART, stored.entries), dtype=stored.dtype), stored.dtype.itemsize
    with Reader(stored, ahead=True) as reader:
        for first in range(0, stored.entries, PART):
            part = buffer[: min(PART, stored.entries - first)]
            reader.read(first * size, _bytes(part))
            yield part


def _bytes(part: Shaped[Tensor, "..."]) -> memoryview:
    flat: Any = part.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat).cast("B")


def _require_held(adapter: Path, lost: float, kind: torch.dtype, accept: Sequence[str]) -> None:
    if lost > LOST and ROUNDING not in accept:
        raise FrankenlensError(
            f"{adapter}: in {type_name(kind)}, {lost:.0%} of the adapter's update would be lost where merged weights "
            f"are rounded. Write them in dtype='float32' (--dtype float32), or take the loss: "
            f"accept=[{ROUNDING!r}] (--accept {ROUNDING})."
        )


@torch.no_grad()
def _proved(in_: Path, adapter: Path, written: Path, lost: float, progress: bool) -> tuple[float, float]:
    """How far the logits of what was written are from PEFT's, and these from IN's, on the prompt of an opening."""
    model: Any = load_model(in_, dtype=torch.float32)
    inputs = opening_inputs(model, _processor(in_))
    own, wanted = adapted_logits(model, adapter, read_adapter(adapter), inputs)
    del model
    found = undisturbed_logits(load_model(written, dtype=torch.float32), inputs)
    off, moved = (float((one - wanted).abs().max()) for one in (found, own))
    if not off <= max(tolerance(wanted), max(_WRONG, 3 * lost) * moved):
        raise FrankenlensError(
            f"{adapter}: what would be written is not the adapted model: on a prompt, its logits are off by {off:.3g}, "
            f"where the adapter moves them by {moved:.3g}. Merge it where it was trained (merge_and_unload)."
        )
    return off, moved


def _processor(folder: Path) -> Any:
    try:
        return load_processor(folder, local_files_only=True)
    except FrankenlensError:  # then the proof is on words alone
        return None
