"""A checkpoint in whatever layout it was left: which files hold its tensors, and which its settings.

One reader for all of them: `layout_of(folder).read()` gives names and places of tensors, whether they lie in
safetensors, in shards of `torch.distributed.checkpoint`, in one file a process (verl, EasyR1, SkyRL) or in a universal
checkpoint of DeepSpeed. No tensor is read, and nothing that a file names is run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.hub import cached_file

from hooks.errors import FrankenlensError
from hooks.stored.distributed import INDEX, distributed_entries
from hooks.stored.entry import Entry
from hooks.stored.files import SHOWN, entries, weight_files
from hooks.stored.ranks import rank_entries
from hooks.stored.universal import is_universal, universal_entries

WITHIN = ("actor", "policy", "pytorch_model_fsdp_0", "weights", "model", "policy/weights")
"""Folders of a step in which trainers put the policy: verl and EasyR1, SkyRL, accelerate, and others."""
BESIDE = "huggingface"
"""Where verl and SkyRL put configuration and tokenizer."""
SAFETENSORS = "safetensors"
NUMBERED = "safetensors without an index"
DISTRIBUTED = "shards of torch.distributed.checkpoint"
RANKS = "shards of the processes of a trainer"
UNIVERSAL = "a universal checkpoint of DeepSpeed"
_NUMBER = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_BY_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_WORDS = ("tokenizer_config.json", "tokenizer.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Layout:
    """How a checkpoint lies on disk.

    Attributes:
        folder: as it was given.
        weights: where its tensors are.
        kind: `SAFETENSORS`, `NUMBERED`, `DISTRIBUTED`, `RANKS` or `UNIVERSAL`.
        settings: where its config.json is.
        processor: where its tokenizer and processor are.
        borrowed: what of these it has not itself.
        variant: as in transformers.
    """

    folder: Path
    weights: Path
    kind: str
    settings: Path
    processor: Path
    borrowed: tuple[str, ...] = ()
    variant: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether transformers reads it by itself."""
        return self.kind == SAFETENSORS

    def read(self) -> dict[str, Entry]:
        """Names on disk and places of all tensors.

        Raises:
            FrankenlensError: a file is missing, damaged, names code, or its parts do not make the whole.
        """
        if self.kind == DISTRIBUTED:
            return distributed_entries(self.weights)
        if self.kind == RANKS:
            return rank_entries(self.weights)
        if self.kind == UNIVERSAL:
            return universal_entries(self.weights)
        files = numbered(self.weights) if self.kind == NUMBERED else weight_files(self.weights, self.variant)
        return {key: one for file in files for key, one in entries(file).items()}


def layout_of(folder: Path | str, variant: str | None = None, settings: Path | str | None = None) -> Layout:
    """What a folder holds.

    Args:
        folder: a checkpoint, or a step of a run that holds one.
        variant: as in transformers: `model.VARIANT.safetensors`.
        settings: folder or repository of the model that it was trained from; its config.json, tokenizer and processor
            are taken where the checkpoint has none of its own.

    Raises:
        FrankenlensError: no checkpoint that is known, two of them, or no config.json.
    """
    folder = Path(folder)
    found = trainers(folder)
    if found is None:
        weight_files(folder, variant)
        return Layout(folder, folder, SAFETENSORS, folder, folder, variant=variant)
    weights, kind = found
    places = dict.fromkeys([weights, weights / BESIDE, folder, folder / BESIDE])
    lent = None if settings is None else _local(settings)
    config = next((one for one in places if os.path.isfile(one / "config.json")), lent)
    words = next((one for one in places if any(os.path.isfile(one / name) for name in _WORDS)), lent)
    if config is None:
        raise FrankenlensError(
            f"{folder} holds {kind} and no config.json, neither there nor in {BESIDE}/: give it as RL beside its IN, "
            "whose settings are then taken, or say whose they are (settings=FOLDER)."
        )
    borrowed = [name for name, one in (("config.json", config), ("tokenizer", words)) if one not in places]
    return Layout(folder, weights, kind, config, words or config, tuple(borrowed), variant)


def trainers(folder: Path) -> tuple[Path, str] | None:
    """Where a trainer's own layout is in a folder, and which; None where there is none, or only safetensors as
    `save_pretrained` writes them.

    Raises:
        FrankenlensError: two sets of weights.
    """
    if not os.path.isdir(folder) or os.path.isfile(folder / "adapter_config.json"):
        return None
    if kind := _kind(folder):
        return folder, kind
    if _has_safetensors(folder):
        return None
    inside = {folder / name: kind for name in WITHIN if (kind := _kind(folder / name))}
    if len(inside) > 1:
        told = ", ".join(str(one.relative_to(folder)) for one in inside)
        raise FrankenlensError(
            f"{folder} holds several checkpoints ({told}); give the folder of the one that is meant."
        )
    return next(iter(inside.items()), None)


def _kind(folder: Path) -> str | None:
    if not os.path.isdir(folder):
        return None
    kinds = {
        DISTRIBUTED: os.path.isfile(folder / INDEX) and any(folder.glob("*.distcp")),
        RANKS: any(folder.glob("model_world_size_*_rank_*.pt")),
        UNIVERSAL: is_universal(folder),
        NUMBERED: not _has_safetensors(folder) and bool(_numbered(folder)),
    }
    found = [kind for kind, there in kinds.items() if there]
    if found and _has_safetensors(folder):
        found.append(SAFETENSORS)
    if len(found) > 1:
        raise FrankenlensError(
            f"{folder} holds two sets of weights, {' and '.join(found)}; move the one that is not meant to a folder of "
            "its own."
        )
    if any(_BY_RANK.fullmatch(file.name) for file in folder.glob("shard-*.safetensors")):
        raise FrankenlensError(
            f"{folder} holds safetensors of the processes of a run (shard-00001-model-…), which are not read: join "
            "them first (torch.distributed.checkpoint, consolidate_safetensors_files)."
        )
    return found[0] if found else None


def _has_safetensors(folder: Path) -> bool:
    return any(
        os.path.isfile(folder / name) for name in ("model.safetensors", "model.safetensors.index.json")
    )


def _numbered(folder: Path) -> dict[tuple[str, int], dict[int, Path]]:
    """Stem and number of files, to the files by their numbers."""
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for file in folder.glob("*-of-*.safetensors"):
        if (m := _NUMBER.fullmatch(file.name)) and not _BY_RANK.fullmatch(file.name):
            found.setdefault((m[1], int(m[3])), {})[int(m[2])] = file
    return found


def numbered(folder: Path) -> list[Path]:
    """The files `model-00001-of-00003.safetensors` …, of which no index says what is in them.

    Raises:
        FrankenlensError: one is missing, or there are two sets.
    """
    sets = _numbered(folder)
    if len(sets) > 1:
        told = " and ".join(f"{stem}-…-of-{n}" for stem, n in sorted(sets))
        raise FrankenlensError(
            f"{folder} holds {len(sets)} sets of weights, {told}; delete those that are not meant."
        )
    (stem, total), files = next(iter(sets.items()))
    missing = [number for number in range(1, total + 1) if number not in files]
    if missing or len(files) != total:
        raise FrankenlensError(
            f"{folder}: of the {total} files {stem}-…-of-{total}.safetensors, number "
            f"{', '.join(map(str, missing[:SHOWN])) or 'of too many'} is missing; download it again."
        )
    return [files[number] for number in sorted(files)]


def _local(settings: Path | str) -> Path:
    """The folder of a checkpoint, or that in the cache of a repository."""
    if os.path.isdir(settings):
        inner = trainers(Path(settings))
        return Path(settings) if inner is None else layout_of(settings).settings
    found = cached_file(str(settings), "config.json")
    return Path(str(found)).parent


def places(path_or_id: Path | str, settings: Path | str | None = None) -> tuple[Path | str, Path | str]:
    """Where a checkpoint's config.json and its processor are: there itself, but for a trainer's folder.

    Raises:
        FrankenlensError: as `layout_of`.
    """
    if not os.path.isdir(path_or_id) or trainers(Path(path_or_id)) is None:
        return path_or_id, path_or_id
    layout = layout_of(path_or_id, settings=settings)
    return layout.settings, layout.processor


def borrowed(path_or_id: Path | str, settings: Path | str | None = None) -> str:
    """What a checkpoint has not itself, and whose is taken, in words; nothing where it has all.

    Raises:
        FrankenlensError: as `layout_of`.
    """
    if not os.path.isdir(path_or_id) or trainers(Path(path_or_id)) is None:
        return ""
    names = layout_of(path_or_id, settings=settings).borrowed
    return f"{' and '.join(names)} of {settings}" if names else ""
