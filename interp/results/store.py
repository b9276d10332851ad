"""The store under all long work: finished parts on disk, so that whatever is killed goes on where it was.

A part is one file, written aside and renamed once it is complete. It holds what it is, what it is of, and a checksum of
all of it, which is looked at before anything in it is read. A damaged part is made again, and said to be.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.results.digest import digest
from interp.results.lock import locked, making
from interp.results.whole import read_sealed, sealed, unsealed, write_whole

ABOUT = "about.json"
_ARRAY, _TABLE = "__array__", "__table__"


class Store:
    """A folder of finished parts of one piece of work.

    Args:
        folder: made when the first part is kept.
        about: all that the parts depend on and their own fingerprints do not say; a folder serves one work.

    Raises:
        FrankenlensError: the folder holds parts of another work, or cannot be written to.
    """

    def __init__(self, folder: Path | str, about: Mapping[str, Any]) -> None:
        self.folder, self._prefix = Path(folder), ""
        self._text = json.dumps(about, indent=1, sort_keys=True, default=str)
        self.key = sha256(self._text.encode()).hexdigest()
        _require_place(self.folder)
        self._require_own()

    def under(self, name: str) -> Store:
        """The same store, in which all names begin with this one."""
        inner = copy.copy(self)
        inner._prefix = f"{self._prefix}{name}-"
        return inner

    def load(self, name: str, of: str = "") -> Any:
        """What was kept by this name; None where nothing was, or (with a warning) it is damaged.

        Args:
            name: of the part.
            of: a fingerprint of what it depends on, beside `about`.

        Raises:
            FrankenlensError: it is of something else, or a folder stands in its place.
        """
        path = self._path(name)
        data = read_sealed(path)
        if data is None:
            return None
        found = json.loads(data)
        if found["name"] != path.name or found["of"] != self._of(of):
            raise FrankenlensError(
                f"{path} is of other prompts or settings than this run's; choose another folder, or delete it"
            )
        return _read(found["value"])

    def save(self, name: str, value: Any, of: str = "") -> None:
        """Keep a part, all or nothing: plain data (JSON), NumPy's arrays and pandas's tables in it.

        Raises:
            FrankenlensError: the disk is full, or the place cannot be written to.
        """
        path = self._path(name)
        whole = {"name": path.name, "of": self._of(of), "value": _plain(value)}
        with making(self.folder):
            if not os.path.exists(self.folder / ABOUT):
                self._write_about()
            write_whole(path, sealed(json.dumps(whole).encode()))

    def part(self, name: str, compute: Callable[[], Any], of: str = "") -> Any:
        """What was kept by this name, or what is computed now and kept; either way as it is read from disk."""
        found = self.load(name, of)
        if found is None:
            self.save(name, value := compute(), of)
            found = as_read(value)
        return found

    def is_of(self, about: Mapping[str, Any]) -> bool:
        """Whether its parts are of this."""
        return json.loads(self._text) == json.loads(json.dumps(about, default=str))

    def holds(self, name: str, of: str = "") -> bool:
        """Whether a part is kept by this name, whole and of this."""
        try:
            data = unsealed(self._path(name).read_bytes())
        except OSError:
            return False
        return data is not None and json.loads(data)["of"] == self._of(of)

    def sizes(self, name: str) -> list[int]:
        """Every n of which there is a part `name-n`, ascending; it may be damaged, or of something else."""
        start = self._path(f"{name}-").name.removesuffix(".part")
        found = (path.name[len(start) :] for path in self.folder.glob(f"{escape(start)}*.part"))
        return sorted(int(own[:-5]) for own in found if own[:-5].isdecimal())

    def _of(self, fingerprint: str) -> str:
        return sha256((self.key + fingerprint).encode()).hexdigest()

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(self._prefix + name, safe=' ,+')}.part"

    def _write_about(self) -> None:
        text = {"about": json.loads(self._text), "sha256": self.key}
        write_whole(self.folder / ABOUT, json.dumps(text, indent=1, sort_keys=True).encode())

    def _require_own(self) -> None:
        """The folder's parts are of this work; what is left of a part that was being written is removed."""
        path = self.folder / ABOUT
        if not os.path.isdir(self.folder):
            return
        for left in self.folder.glob(".*.part.*"):
            if not _is_alive(left.name.rpartition(".")[2]):
                left.unlink(missing_ok=True)
        if not os.path.lexists(path):
            return
        if os.path.isdir(path):
            raise FrankenlensError(f"{path} is a folder, where a file is kept; remove it.")
        found = _about(path)
        if found is None:  # the parts say themselves what they are of
            warnings.warn(f"{path} is damaged and is written again", stacklevel=3)
            self._write_about()
            return
        mine = json.loads(self._text)
        other = sorted(name for name in mine.keys() | found.keys() if mine.get(name) != found.get(name))
        if other:
            raise FrankenlensError(
                f"{self.folder} holds another run (other {', '.join(other)}); choose another folder, or delete it"
            )


_OPENED: ContextVar[Callable[[Path, Mapping[str, Any]], "Store"] | None] = ContextVar(
    "frankenlens_stores", default=None
)


@contextmanager
def stores_opened(by: Callable[[Path, Mapping[str, Any]], Store]) -> Iterator[None]:
    """`opened` inside gives what this gives of a folder and what its parts depend on: another process's stores."""
    token = _OPENED.set(by)
    try:
        yield
    finally:
        _OPENED.reset(token)


def are_elsewhere() -> bool:
    """Whether stores are another process's, who has their folders to himself."""
    return _OPENED.get() is not None


def opened(folder: Path | str, about: Mapping[str, Any]) -> Store:
    """The `Store` in a folder; of processes that share a work (`interp.cluster`), that of the one who keeps it.

    Raises:
        FrankenlensError: as `Store`.
    """
    elsewhere = _OPENED.get()
    return Store(folder, about) if elsewhere is None else elsewhere(Path(folder), about)


@contextmanager
def alone_with(folder: Path | str, about: Mapping[str, Any]) -> Iterator[Store]:
    """`opened`, and nobody else writes there meanwhile.

    Raises:
        FrankenlensError: as `Store` and `interp.results.lock.locked`.
    """
    with nullcontext() if are_elsewhere() else locked(folder):
        yield opened(folder, about)


def part(keep: Store | None, name: str, compute: Callable[[], Any], of: str = "") -> Any:
    """`Store.part`, or what is computed where nothing is to be kept."""
    return compute() if keep is None else keep.part(name, compute, of)


def begun(keep: Store | None, name: str, most: int, of: Callable[[int], str]) -> int:
    """How many rows the longest part `name-n` has, of at most so many; 0: there is none, or none is of these.

    Args:
        keep: the store, if there is one.
        name: of the parts, without the number of their rows.
        most: rows.
        of: from n to the part's fingerprint.
    """
    sizes = [] if keep is None else [n for n in keep.sizes(name) if n <= most]
    return next((n for n in reversed(sizes) if keep and keep.holds(f"{name}-{n}", of(n))), 0)


def under(keep: Store | None, name: str) -> Store | None:
    """`Store.under`, where there is one."""
    return None if keep is None else keep.under(name)


def fingerprint(*values: Any) -> str:
    """Of plain data and arrays, for `Store.part`."""
    return sha256(json.dumps(values, default=_as_data).encode()).hexdigest()


def _as_data(value: Any) -> Any:
    return digest(value) if isinstance(value, (Tensor, np.ndarray)) else str(value)


def as_read(value: Any) -> Any:
    """What a part is when it is read from disk again."""
    return _read(json.loads(json.dumps(_plain(value))))


def _about(path: Path) -> dict[str, Any] | None:
    """What the folder is of; None where the file is damaged."""
    try:
        if path.is_symlink():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(found["about"], indent=1, sort_keys=True)
        sound = sha256(text.encode()).hexdigest() == found["sha256"] and isinstance(found["about"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found["about"] if sound else None


def _is_alive(pid: str) -> bool:
    """Whether a process of this machine has the number; what is none is nobody's."""
    if os.name == "nt":  # there, that would end it
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _require_place(folder: Path) -> None:
    place = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        raise FrankenlensError(
            f"cannot write to {folder}: {place} is no folder that you may write to; choose another one"
        )


def _plain(value: Any) -> Any:
    """As JSON has it; numbers to the last bit."""
    if isinstance(value, np.ndarray):
        return {_ARRAY: _plain_array(value)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "to_dict") and hasattr(value, "dtypes"):  # a pandas table
        return {_TABLE: {str(name): [_plain(one) for one in value[name]] for name in value}}
    raise TypeError(f"a part of a store is plain data, arrays and tables, not {type(value).__name__}")


def _plain_array(value: Shaped[np.ndarray, "..."]) -> Any:
    if value.dtype.kind in "OUS":
        return {"shape": value.shape, "text": [str(one) for one in value.ravel()]}
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"shape": value.shape, "dtype": value.dtype.str, "bytes": data}


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(one) for one in value]
    if not isinstance(value, dict):
        return value
    if _TABLE in value:
        import pandas as pd

        return pd.DataFrame({name: _read(column) for name, column in value[_TABLE].items()})
    if _ARRAY not in value:
        return {name: _read(one) for name, one in value.items()}
    own = value[_ARRAY]
    if "text" in own:
        return np.array(own["text"], dtype=str).reshape(own["shape"])
    data = base64.b64decode(own["bytes"])
    whole = np.frombuffer(data, own["dtype"]) if data else np.empty(0, own["dtype"])
    return whole.reshape(own["shape"]).copy()
