"""Which files of a folder hold a checkpoint's weights, and what stands in them: one answer, for whoever reads them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from hooks.errors import FrankenlensError, one_line, shown
from hooks.stored.entry import DTYPES, Entry
from hooks.stored.inside import require_inside
from hooks.stored.settings import settings_of
from hooks.whereabouts import require_folder

SHOWN = 5
_QUANTIZED = re.compile(r"^(F[468](_.*)?|I8|U8|I4|U4)$")
_PACKED = re.compile(r"\.(qweight|weight_packed)$")


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that hold a checkpoint's weights.

    Args:
        folder: the checkpoint.
        variant: as in transformers: `model.VARIANT.safetensors`.

    Raises:
        FrankenlensError: no such folder, an adapter, no configuration, no safetensors, an index that names anything
            but safetensors inside the folder, a missing shard, or two sets of weights.
    """
    require_folder(
        folder,
        "a local checkpoint folder with config.json in it (a repository is downloaded by `hf download OWNER/NAME "
        "--local-dir FOLDER`)",
    )
    if os.path.isfile(folder / "adapter_config.json"):
        raise FrankenlensError(
            f"{folder} is a PEFT adapter, not a checkpoint: where models are run, it is given as RL beside its IN "
            "(Pair.from_pretrained, --rl); where files are read, merge it (merge_and_unload) and save the whole model."
        )
    if not os.path.isfile(folder / "config.json"):
        raise FrankenlensError(
            f"{folder}: no config.json, so this is not a checkpoint written by save_pretrained."
        )
    middle = f".{variant}" if variant else ""
    single, index = (
        folder / f"model{middle}.safetensors",
        folder / f"model.safetensors.index{middle}.json",
    )
    named = settings_of(folder / "config.json").get("transformers_weights")
    if named is not None:
        require_inside(folder / "config.json", [named], (".safetensors", ".json"))
        single, index = folder / named, folder / named
    shards = shards_of(index) if index.suffix == ".json" and os.path.isfile(index) else []
    if shards and os.path.isfile(single) and single != index and single.name not in shards:
        raise FrankenlensError(
            f"{folder} holds two sets of weights, {single.name} and the {len(shards)} shards of {index.name}; delete "
            "the one that is not meant (it is left over from an earlier save)."
        )
    if not shards and not (single.suffix == ".safetensors" and os.path.isfile(single)):
        raise FrankenlensError(
            f"{folder}: {_instead(folder)}. Only safetensors are read: load it once in a place you trust and call "
            "model.save_pretrained(folder)."
        )
    missing = [name for name in shards if not os.path.isfile(folder / name)]
    if missing:
        raise FrankenlensError(
            f"{folder}: {index.name} names {', '.join(missing[:SHOWN])}, which is missing; download it again."
        )
    return [folder / name for name in shards] or [single]


def entries(file: Path) -> dict[str, Entry]:
    """Names and places of a file's tensors (https://huggingface.co/docs/safetensors); safetensors checks the file.

    Raises:
        FrankenlensError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except Exception as error:  # safetensors raises a class of its own
        raise FrankenlensError(
            f"{file} cannot be read as safetensors: {one_line(error)}; download it again."
        ) from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = {}
    for key, about in header.items():
        first, last = about["data_offsets"]
        found[key] = Entry(((file, 8 + length + first, last - first),), tuple(about["shape"]), about["dtype"])
    return found


def require_one_precision(folder: Path, stored: Mapping[str, Entry]) -> None:
    """Refuse quantized tensors that nothing says how to read, and a word of quantization where nothing is quantized.

    Args:
        folder: the checkpoint, with its config.json.
        stored: all of its tensors.

    Raises:
        FrankenlensError: names the tensor, or the setting, and the way out.
    """
    config = settings_of(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    said = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    packed = [key for key, entry in stored.items() if _QUANTIZED.match(entry.kind) or _PACKED.search(key)]
    kinds = {entry.kind for entry in stored.values()}
    if packed and said is None:
        raise FrankenlensError(
            f"{folder}: {packed[0]} is {stored[packed[0]].kind} ({len(packed)} tensors are quantized), but config.json "
            "has no quantization_config, so they would be read without their scales: take the config.json that was "
            "saved with them, or save the model unquantized."
        )
    if said is not None and all(kind in DTYPES and DTYPES[kind].is_floating_point for kind in kinds):
        method = said.get("quant_method", "of no method") if isinstance(said, Mapping) else said
        raise FrankenlensError(
            f"{folder}: config.json has a quantization_config ({method}), but no tensor is quantized (they are "
            f"{', '.join(sorted(kinds))}): it is left over, so delete that entry from config.json."
        )


def require_shape(folder: Path | str, name: str, stored: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuse a tensor of another shape than the configuration gives it.

    Raises:
        FrankenlensError: names both, and what to do about a vocabulary that was resized.
    """
    if tuple(stored) == tuple(wanted):
        return
    rows = len(stored) == len(wanted) > 1 and tuple(stored[1:]) == tuple(wanted[1:])
    hint = (
        f"config.json is from before the vocabulary was resized: set vocab_size to {stored[0]} there"
        if rows and ("embed" in name or "head" in name or "wte" in name)
        else "the files are not of one checkpoint: download or save it again, whole"
    )
    raise FrankenlensError(
        f"{folder}: {name} is {list(stored)} in the file but {list(wanted)} by config.json; {hint}."
    )


def shards_of(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        FrankenlensError: it is no index, or names anything but safetensors files inside its folder.
    """
    named = settings_of(index).get("weight_map")
    if not isinstance(named, Mapping) or not named:
        raise FrankenlensError(
            f"{index}: weight_map is {shown(named)}, not an object that says in which file each tensor lies; download "
            "it again."
        )
    names = list(named.values())
    require_inside(index, names)
    return sorted(set(names))


def _instead(folder: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    return f"only pickle files ({', '.join(pickles)})" if pickles else "no model.safetensors and no index"
