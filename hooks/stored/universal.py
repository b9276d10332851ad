"""DeepSpeed's universal checkpoints: `zero/PARAMETER/fp32.pt`, each a whole parameter in float32.

https://www.deepspeed.ai/tutorials/universal-checkpointing/
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hooks.errors import FrankenlensError, shown
from hooks.stored.entry import Entry, kind_of
from hooks.stored.pickles import View, read_saved

ZERO, WEIGHT = "zero", "fp32.pt"


def is_universal(folder: Path) -> bool:
    """Whether a folder is a universal checkpoint, or its folder `zero`."""
    return any((folder / ZERO).glob(f"*/{WEIGHT}"))


def universal_entries(folder: Path) -> dict[str, Entry]:
    """Names and places of all parameters; those that were not trained are not in such a checkpoint.

    Raises:
        FrankenlensError: names the file: it names code, or holds no parameter.
    """
    return {file.parent.name: _entry(file) for file in sorted((folder / ZERO).glob(f"*/{WEIGHT}"))}


def _entry(file: Path) -> Entry:
    saved = read_saved(file)
    view = saved.get("param") if isinstance(saved, Mapping) else saved
    if not isinstance(view, View):
        raise FrankenlensError(f"{file} holds {shown(saved)}, not a parameter.")
    if isinstance(saved, Mapping) and saved.get("vocab_tensor"):
        raise FrankenlensError(f"{file}: a vocabulary with padding (Megatron-DeepSpeed), which is not read.")
    return Entry((view.piece(file.parent.name),), view.shape, kind_of(view.dtype))
