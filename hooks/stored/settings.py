"""The settings beside a checkpoint's weights: JSON objects, looked at before a model is built of what they say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from hooks.errors import FrankenlensError, one_line, shown

FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "adapter_config.json",
)
"""What transformers and PEFT read in a folder, each of them one JSON object."""
LARGEST = 1 << 28
"""Bytes of such a file; the largest tokenizers have a tenth of that."""
MOST_LAYERS, MOST_PARTS = 1000, 100_000
"""Layers, and experts or heads, of a model that is built where its files do not hold more."""

_LAYERS = re.compile(r"(?:layers?|blocks?|depths?)$")
_PARTS = re.compile(r"(?:experts?|heads?|stages?)$")
_LANGUAGE = ("text_config", "llm_config", "language_config", "decoder_config")
_KERNEL = re.compile(r"(?:attn|experts|attention)_implementation$")


def settings_of(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FrankenlensError: it cannot be read, is no JSON, or holds something else than an object.
    """
    again = "take the file of the original checkpoint"
    try:
        size = file.stat().st_size
        if size > LARGEST:
            raise FrankenlensError(f"{file} has {size:,} bytes, too many for a file of settings; {again}.")
        found = json.loads(file.read_text(encoding="utf-8"))
    except FrankenlensError:
        raise
    except RecursionError as error:
        raise FrankenlensError(f"{file} is nested too deeply to be read; {again}.") from error
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON, a number of too many digits
        raise FrankenlensError(f"{file} cannot be read as JSON: {one_line(error)}; {again}.") from error
    if not isinstance(found, dict):
        raise FrankenlensError(f"{file} holds {shown(found)}, not a JSON object; {again}.")
    return found


def require_sound_settings(folder: Path, n_stored: int = 0) -> None:
    """Refuse files of settings that cannot be read, or that describe what no model should be built of.

    Args:
        folder: of a checkpoint, an adapter or a processor.
        n_stored: tensors in its files; so many layers it may have at least.

    Raises:
        FrankenlensError: names the file, and the entry.
    """
    for name in FILES:
        if os.path.isfile(folder / name):
            found = settings_of(folder / name)
            if name == "config.json":
                _require_buildable(folder / name, found, n_stored)


def _require_buildable(file: Path, config: Mapping[str, Any], n_stored: int) -> None:
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise FrankenlensError(f"{file}: model_type is {shown(kind)}; it is a text, such as 'qwen2_5_vl'.")
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
        raise FrankenlensError(f"{file}: architectures is {shown(named)}; it is a list of class names.")
    for part in _parts_of(kind):
        value = config.get(part, {})
        if not isinstance(value, Mapping) and (value is not None or part in _LANGUAGE):
            raise FrankenlensError(
                f"{file}: {part} is {shown(value)}, not a JSON object, so a model of some default size would be built "
                "for it; take the file of the original checkpoint."
            )
    for name, value in _entries(config):
        most = (
            max(MOST_LAYERS, n_stored)
            if _LAYERS.search(name)
            else MOST_PARTS
            if _PARTS.search(name)
            else None
        )
        if most is not None and isinstance(value, (int, float)) and value > most:
            raise FrankenlensError(
                f"{file}: {name} is {shown(value)}, more than any model has (at most {most} are built)."
            )
        if _KERNEL.search(name) and "/" in str(value):
            raise FrankenlensError(
                f"{file}: {name} is {shown(value)}, code from a repository, which is not run; delete that entry."
            )


def _parts_of(kind: str | None) -> tuple[str, ...]:
    """The entries of a configuration that are configurations."""
    try:
        of_kind: Any = CONFIG_MAPPING[kind] if kind is not None and kind in CONFIG_MAPPING else None
        own = getattr(of_kind, "sub_configs", {})
    except (KeyError, AttributeError, ImportError):
        own = {}
    return tuple({*own, *_LANGUAGE, "vision_config"})


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every entry of nested objects, by its name."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            yield from one.items()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
