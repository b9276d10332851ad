"""A process that opens models of its own and does, with others, one work."""

from __future__ import annotations

import io
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from hooks.errors import FrankenlensError
from hooks.memory import beside, memory_limit
from hooks.shared import Part, sharing
from interp.cluster.stores import Ask, DistantStore
from interp.results.store import stores_opened

Found = TypeVar("Found")


@dataclass(frozen=True)
class Place:
    """What workers have in common with who started them, so that they find the same files and compute the same.

    Attributes:
        folder: that relative paths start from.
        threads: of PyTorch.
        versions: package to version.
        processes: workers on one machine, at most, where they have main memory in common.
    """

    folder: str
    threads: int
    versions: Mapping[str, str]
    processes: int


class Worker:
    """Ray runs one of these for every pair.

    Args:
        name: of this worker and no other, before or after it.
        coordinator: the run's.
        place: see `Place`.
    """

    def __init__(self, name: str, coordinator: Any, place: Place) -> None:
        with suppress(OSError):  # then absolute paths are all that can be found here, and each says so
            os.chdir(place.folder)
        self._name, self._coordinator, self._place = name, coordinator, place

    def where(self) -> tuple[int, str]:
        """Process and machine."""
        return os.getpid(), socket.gethostname()

    def run(self, open_models: Callable[[], Any], work: Callable[[Any], Any], limit: int | None) -> bytes:
        """Open models, do the work on them with the other workers, and close them.

        Returns:
            What the work returned, as it is sent; it is the same in every worker.

        Raises:
            FrankenlensError: other versions are installed here than where the run was started; and whatever opening
                and the work raise.
        """
        from ray import cloudpickle

        _require_versions(self._place.versions)
        torch.set_num_threads(self._place.threads)
        with (
            _told(lambda line: self._ask("tell", line)),
            memory_limit(limit),
            beside(self._place.processes),
            closing(open_models()) as models,
            sharing(Shares(self._ask, self._name)),
            stores_opened(lambda folder, about: DistantStore(folder.absolute(), about, self._ask)),
        ):
            return cloudpickle.dumps(work(models))

    def _ask(self, method: str, *args: Any) -> Any:
        import ray
        from ray.exceptions import RayTaskError

        try:
            return ray.get(getattr(self._coordinator, method).remote(*args))
        except RayTaskError as error:
            raise plain_error(error) from error


def plain_error(error: Any) -> Exception:
    """What was raised where a task ran, without what Ray puts around it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


@dataclass
class Shares:
    """How a worker shares its work: it does parts that the coordinator gives out, and fetches what the others did.

    Attributes:
        ask: asks the coordinator.
        name: the worker's.
    """

    ask: Ask
    name: str
    _calls: int = field(default=0)

    def share(
        self, what: str, parts: Sequence[Part], do: Callable[[Part], Found], near: Callable[[Part], Any]
    ) -> Iterator[tuple[Part, Found]]:
        """See `hooks.shared.shared`."""
        from ray import cloudpickle

        # Workers that did not come here alike (which they should) share nothing, rather than the wrong things.
        every = sha256(repr(sorted(map(str, _leaves(parts)))).encode()).hexdigest()[:8]
        key, self._calls = f"{self._calls:05d} {what} {every}", self._calls + 1
        names, close = [_name(part) for part in parts], [str(near(part)) for part in parts]
        parts = cloudpickle.loads(self.ask("begin", key, what, cloudpickle.dumps(list(parts)), names, close))
        own: dict[int, Found] = {}
        while (number := self.ask("take", key, self.name)) is not None:
            own[number] = do(parts[number])
            self.ask("finish", key, number, self.name, cloudpickle.dumps(own[number]))
        for number, part in enumerate(parts):
            # one's own is fetched, too: another may have finished it first, and all are to have the same
            yield part, cloudpickle.loads(self.ask("found", key, number))


def _leaves(parts: Any) -> Iterator[Any]:
    """The rows in parts, however they are split."""
    if isinstance(parts, (list, tuple, range)):
        for part in parts:
            yield from _leaves(part)
    else:
        yield parts


def _name(part: Any) -> str:
    rows = sorted(_leaves(part), key=str)
    text = ", ".join(map(str, rows[:8]))
    return f"{text}{', …' if len(rows) > 8 else ''}"


def _require_versions(wanted: Mapping[str, str]) -> None:
    other = {name: (version(name), one) for name, one in wanted.items() if version(name) != one}
    if other:
        told = ", ".join(f"{name} {here} (not {there})" for name, (here, there) in other.items())
        raise FrankenlensError(
            f"{socket.gethostname()} has {told}, and numbers of two versions are not the same: install there what is "
            "installed where the run is started."
        )


@contextmanager
def _told(tell: Callable[[str], Any]) -> Iterator[None]:
    """Warnings, and lines on standard error that are no progress bars, go to who started the run."""

    class Lines(io.TextIOBase):
        """Standard error, line by line."""

        def __init__(self) -> None:
            self._rest = ""

        def write(self, text: str) -> int:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                if line.strip() and "\r" not in line:
                    tell(line)
            return len(text)

    def shown(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        tell(f"{category.__name__}: {message}")

    with redirect_stderr(Lines()), warnings.catch_warnings():  # type: ignore[type-var]
        warnings.showwarning = shown
        yield
