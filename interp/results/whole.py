"""Files that are there whole or not at all, whatever stops the writing; a full disk is one clear error."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from hooks.errors import FrankenlensError
from interp.results.lock import making

_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}
_SEAL = re.compile(rb"\nfrankenlens sha256 ([0-9a-f]{64})\n\Z")
_SEALED = len(b"\nfrankenlens sha256 ") + 64 + 1


def write_whole(path: Path, data: bytes) -> None:
    """Write aside, then rename; what was there is kept where that fails.

    Raises:
        FrankenlensError: the disk is full, or the place cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with told(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def told(path: Path | str) -> Iterator[None]:
    """What stops the writing to a place, as one clear error.

    Raises:
        FrankenlensError: the disk is full, or the operating system refuses.
    """
    try:
        yield
    except FrankenlensError:
        raise
    except OSError as error:
        if is_full(error):
            raise disk_full(path) from error
        raise FrankenlensError(
            f"Cannot write {error.filename or path}: {error.strerror or error}."
        ) from error
    except Exception as error:
        if is_full(error):
            raise disk_full(path) from error
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether it comes of a full disk, also where a library says so in words of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if re.search(r"No space left on device|os error 28\b|errno ?= ?28\b", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(path: Path | str) -> FrankenlensError:
    """The error."""
    return FrankenlensError(
        f"No space is left for {path}. What was finished before is as it was, and nothing half-written stays: make "
        "room, and give the same command again."
    )


def sealed(data: bytes) -> bytes:
    """The bytes with their checksum at the end."""
    return data + b"\nfrankenlens sha256 " + sha256(data).hexdigest().encode() + b"\n"


def unsealed(data: bytes) -> bytes | None:
    """The bytes, if their checksum stands at the end and holds."""
    found = _SEAL.search(data, max(0, len(data) - _SEALED))
    if found is None or sha256(memoryview(data)[: found.start()]).hexdigest() != found[1].decode():
        return None
    return data[: found.start()]


def read_sealed(path: Path) -> bytes | None:
    """What `write_whole(path, sealed(...))` wrote; None where there is nothing, or (with a warning) it is damaged.

    Raises:
        FrankenlensError: a folder stands in its place, or it cannot be read.
    """
    try:
        kind = os.lstat(path).st_mode
        if stat.S_ISDIR(kind):
            raise FrankenlensError(f"{path} is a folder, where a file is kept; remove it.")
        data = unsealed(path.read_bytes()) if stat.S_ISREG(kind) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FrankenlensError(f"Cannot read {path}: {error.strerror}.") from error
    if data is None:
        warnings.warn(f"{path} is damaged and is made again", stacklevel=3)
    return data


def write_record(path: Path, value: Any) -> None:
    """Write plain data as JSON that people can read, with a checksum; the folder is made.

    Raises:
        FrankenlensError: the disk is full, or the place cannot be written to.
    """
    record = {"record": value, "sha256": _of_record(value)}
    with making(path.parent):
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def read_record(path: Path) -> Any:
    """What `write_record` wrote; None where there is nothing, or (with a warning) it is damaged.

    Raises:
        FrankenlensError: a folder stands in its place, or it cannot be read.
    """
    if os.path.isdir(path):
        raise FrankenlensError(f"{path} is a folder, where a file is kept; remove it.")
    if not os.path.lexists(path):
        return None
    try:
        found = json.loads(path.read_bytes()) if stat.S_ISREG(os.lstat(path).st_mode) else {}
        sound = _of_record(found["record"]) == found["sha256"]
    except OSError as error:
        raise FrankenlensError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        sound, found = False, {}
    if not sound:
        warnings.warn(f"{path} is damaged and is made again", stacklevel=3)
    return found["record"] if sound else None


def _of_record(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
