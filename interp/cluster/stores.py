"""A worker's view of the stores that the coordinator keeps."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hooks.shared import is_shared
from interp.results.store import Store, as_read

Ask = Callable[..., Any]
"""Name of a method of the coordinator's, and its arguments, to what it returns."""


class DistantStore(Store):
    """A `Store` on the coordinator's machine.

    Between parts a worker sees it as it was when the run began, as all others do; in a part, which is its own, as it is
    now.

    Args:
        folder: there.
        about: as of a `Store`.
        ask: asks the coordinator.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], ask: Ask) -> None:
        self.folder, self._prefix, self._ask = folder, "", ask
        ask("store", str(folder), about)

    def load(self, name: str, of: str = "") -> Any:
        """See `Store.load`."""
        found = self._ask("load", str(self.folder), self._prefix + name, of, not is_shared())
        return pickle.loads(found)

    def save(self, name: str, value: Any, of: str = "") -> None:
        """See `Store.save`; what another worker kept by this name stands."""
        self._keep(name, value, of)

    def part(self, name: str, compute: Callable[[], Any], of: str = "") -> Any:
        """See `Store.part`; what the first worker computed is everyone's."""
        found = self.load(name, of)
        if found is None:
            found = as_read(self._keep(name, compute(), of))
        return found

    def holds(self, name: str, of: str = "") -> bool:
        """See `Store.holds`."""
        return self._ask("holds", str(self.folder), self._prefix + name, of, not is_shared())

    def _keep(self, name: str, value: Any, of: str) -> Any:
        sent = pickle.dumps(value)
        return pickle.loads(self._ask("keep", str(self.folder), self._prefix + name, sent, of))

    def sizes(self, name: str) -> list[int]:
        """See `Store.sizes`."""
        return self._ask("sizes", str(self.folder), self._prefix + name, not is_shared())
