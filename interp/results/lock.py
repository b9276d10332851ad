"""One run a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from hooks.errors import FrankenlensError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
_HELD: dict[Path, tuple[int, int]] = {}  # of this process: folder -> thread, how often
_NEW = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HELD.clear)


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Nobody else writes to a folder meanwhile. It is made, and removed again if nothing came to be in it.

    Nests within a thread. A process that was killed holds nothing.

    Raises:
        FrankenlensError: another run has the folder, whose process and machine are named; or it cannot be made.
    """
    folder = Path(folder).absolute()
    with making(folder):
        own = folder.resolve()
        first = _note(own)
        try:
            with _taken(folder) if first else nullcontext():
                yield
        finally:
            _forget(own)


def is_locked(folder: Path | str) -> bool:
    """Whether this thread has the folder."""
    with _NEW:
        return _HELD.get(Path(folder).resolve(), (0, 0))[0] == threading.get_ident()


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """A folder and those above it are made, and removed again if nothing came to be in them.

    Raises:
        FrankenlensError: it cannot be made.
    """
    made = _made(folder)
    try:
        yield
    finally:
        _remove_empty(made)


def _made(folder: Path) -> list[Path]:
    """Those that were not there, the outermost first."""
    missing = [one for one in (folder, *folder.parents) if not os.path.exists(one)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing[::-1])
        raise FrankenlensError(
            f"Cannot write to {folder}: {error.strerror}. Choose another --out."
        ) from error
    return missing[::-1]


def _remove_empty(folders: list[Path]) -> None:
    """Of folders, the outermost first, those in which there is nothing."""
    for one in reversed(folders):
        with suppress(OSError):
            one.rmdir()


def _note(folder: Path) -> bool:
    """Whether this thread has the folder for the first time."""
    with _NEW:
        thread, count = _HELD.get(folder, (threading.get_ident(), 0))
        if thread != threading.get_ident():
            raise FrankenlensError(
                f"Another thread of this process writes to {folder}: wait for it, or choose another folder."
            )
        _HELD[folder] = thread, count + 1
        return not count


def _forget(folder: Path) -> None:
    with _NEW:
        thread, count = _HELD.pop(folder)
        if count > 1:
            _HELD[folder] = thread, count - 1


@contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """A lock of the operating system's on a file of the folder, which says whose it is."""
    path = folder / LOCK
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise FrankenlensError(
                f"Cannot write to {folder}: {path.name}: {error.strerror}. Choose another --out."
            ) from error
        try:
            if not _alone(file):
                raise FrankenlensError(
                    f"Another run writes to {folder} ({_whose(file)}): wait for it, or choose another --out."
                )
            if not _is(file, path):  # its holder removed it after we had opened it
                continue
            with suppress(OSError):  # on a full disk the lock holds all the same
                os.ftruncate(file, 0)
                about = {"pid": os.getpid(), "host": socket.gethostname()}
                os.write(file, json.dumps(about).encode())
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return
        finally:
            os.close(file)


def _alone(file: int) -> bool:
    """Take the lock. POSIX's belongs to the process: no child inherits it, and it ends with the process."""
    if fcntl is None:
        import msvcrt

        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _whose(file: int) -> str:
    try:
        about = json.loads(os.pread(file, 4096, 0)) if hasattr(os, "pread") else {}
        return f"process {int(about['pid'])} on {str(about['host'])[:60]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not known yet"
