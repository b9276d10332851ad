"""The text that each token of a trace adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Pieces:
    """The text that each token adds to those before it; `""` for a token that ends inside a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._first = self._read = 0

    def feed(self, token: int) -> str:
        """Take one token."""
        self._ids.append(token)
        known, now = self._decode(self._ids[self._first : self._read]), self._decode(self._ids[self._first :])
        if now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return now[len(known) :]
