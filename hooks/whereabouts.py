"""Files, folders and repositories that are not where they were said to be: what is there instead, and what to give."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError, nearest, shown_path

CHECKPOINT = (
    "a checkpoint's folder (config.json and *.safetensors in it), or a repository of the hub as OWNER/NAME"
)
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LISTED = 5


def require_file(path: str | Path, give: str, option: str = "") -> None:
    """Refuse a file that is not there.

    Args:
        path: which file.
        give: what to give instead, for the message.
        option: of the command line that named it.

    Raises:
        FrankenlensError: "no such file: PATH", with the nearest folder that exists and what it holds.
    """
    if not os.path.isfile(path):
        raise FrankenlensError(absent(path, "file", give, option))


def require_folder(path: str | Path, give: str, option: str = "") -> None:
    """Refuse a folder that is not there; arguments and error as of `require_file`."""
    if not os.path.isdir(path):
        raise FrankenlensError(absent(path, "folder", give, option))


def require_checkpoint(name: str | Path, option: str = "") -> None:
    """Refuse what can only be a path, and is no folder; a name that a repository may have is left to the hub.

    Raises:
        FrankenlensError: "no such folder: PATH", as of `require_file`.
    """
    if not os.path.isdir(name) and (looks_like_path(name) or os.path.exists(name)):
        raise FrankenlensError(absent(name, "folder", CHECKPOINT, option))


def looks_like_path(name: str | Path) -> bool:
    """Whether a name cannot be a repository's: an absolute or relative path, or one of several folders."""
    text = str(name)
    return text.startswith((".", "~")) or _REPOSITORY.fullmatch(text) is None


def absent(path: str | Path, what: str, give: str, option: str = "") -> str:
    """The message that a file or folder is not there.

    Args:
        path: where it was said to be.
        what: "file" or "folder".
        give: what to give instead.
        option: of the command line that named it.
    """
    path, named = Path(path), f" ({option})" if option else ""
    name = shown_path(path)
    if os.path.exists(path):
        other = "folder" if os.path.isdir(path) else "file" if os.path.isfile(path) else "pipe or a device"
        return f"{name}{named} is a {other}, not a {what}; give {give}."
    there = _nearest_folder(path)
    held = sorted(one.name for one in there.iterdir()) if os.access(there, os.R_OK) else []
    missing = path.absolute().relative_to(there.absolute()).parts[0]
    hint = nearest(missing, held)
    shown = f"{', '.join(held[:_LISTED])}{', …' if len(held) > _LISTED else ''}" if held else "nothing"
    told = hint or f"It holds {shown}."
    home = " (~ is not read here: write the folder out)" if str(path).startswith("~") else ""
    return (
        f"no such {what}: {name}{named}{home}. The nearest folder that exists is {there}. {told} Give {give}."
    )


def not_found(name: str | Path, error: Exception, hub: dict[str, Any] | None = None) -> str | None:
    """What to say where transformers found neither a folder nor a repository; None where the fault is another.

    Args:
        name: what was to be loaded.
        error: what transformers raised.
        hub: arguments of `from_pretrained` that say which revision or folder of the repository.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if os.path.isdir(name) or not isinstance(error, OSError) or _is_cached(str(name), hub or {}):
        return None
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)  # type: ignore[arg-type]
    if any(isinstance(one, GatedRepoError) for one in causes):
        why = "the hub has it, and asks for access first: ask there, and log in with `hf auth login`"
    elif any(isinstance(one, RevisionNotFoundError) for one in causes):
        why = "the hub has it, but not this revision"
    elif any(isinstance(one, RepositoryNotFoundError) for one in causes):
        why = "the hub has no repository of that name, or none that you may see (`hf auth login`)"
    else:
        why = (
            "there is no copy of it in the cache, and the hub was not reached: download it where there is a network "
            f"(`hf download {name} --local-dir FOLDER`), and give that folder"
        )
    folder = _nearest_folder(Path(name))
    return (
        f"no such folder: {name} (the nearest that exists is {folder}), and as a repository of the hub: {why}. Give "
        f"{CHECKPOINT}."
    )


def _is_cached(name: str, hub: dict[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    where = {key: hub[key] for key in ("revision", "cache_dir") if hub.get(key) is not None}
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", **where), str)
    except ValueError:
        return False


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if os.path.isdir(folder))
