"""Names of files that a checkpoint's own files give: they lie in its folder, or are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hooks.errors import FrankenlensError, shown


def require_inside(file: Path, names: Sequence[Any], suffixes: Sequence[str] = (".safetensors",)) -> None:
    """Refuse names of weights that are no safetensors, or lie elsewhere than in the folder of the file that names them.

    A name that is a link is followed: a cache is made of them.

    Raises:
        FrankenlensError: quotes the first.
    """
    for name in names:
        if not isinstance(name, str) or not name.endswith(tuple(suffixes)):
            raise FrankenlensError(
                f"{file} names {shown(name)} for weights; only safetensors are read: load it once in a place you "
                "trust and call model.save_pretrained(folder)."
            )
        leaves = any(
            kind(name).is_absolute() or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath)
        )
        if leaves or PureWindowsPath(name).drive or "\0" in name:
            raise FrankenlensError(
                f"{file} names {shown(name)}, which is outside of its folder; weights lie beside their index."
            )
