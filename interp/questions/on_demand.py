"""Images that are decoded when they are used: a photo of 12 megapixels is 4 MB in its file, and 36 MB as pixels."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, Generic, TypeVar, overload

from PIL import Image

from hooks.errors import FrankenlensError, one_line

KEPT = 1 << 28
"""Bytes of decoded images that are kept at once, those that were used last; all others are decoded again."""


class OnDemand:
    """One image, which was read once and can be read again.

    Args:
        read: decodes it, as `interp.questions.images.as_seen` gives it.
        first: what that gave.
        name: for the message of a refusal.
    """

    def __init__(self, read: Callable[[], Image.Image], first: Image.Image, name: str) -> None:
        self._read, self._name, self._digest = read, name, _digest(first)
        _DECODED.keep(self, first)
        weakref.finalize(self, _DECODED.drop, id(self))

    def image(self) -> Image.Image:
        """The image.

        Raises:
            FrankenlensError: its file is gone, or is not what it was.
        """
        return _DECODED.of(self) or _DECODED.keep(self, self._again())

    def _again(self) -> Image.Image:
        try:
            image = self._read()
        except MemoryError:
            raise
        except Exception as error:
            raise FrankenlensError(f"{one_line(error)}; it could be read when the rows were") from error
        if _digest(image) != self._digest:
            raise FrankenlensError(f"image {self._name} is another one than when the rows were read")
        return image


class Images(Sequence[Image.Image]):
    """The images of an example, each decoded when it is asked for; equal, copied and pickled as the tuple of them."""

    def __init__(self, each: Sequence[OnDemand]) -> None:
        self._each = tuple(each)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Image.Image, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return tuple(one.image() for one in self._each[index])
        return self._each[index].image()

    def __len__(self) -> int:
        return len(self._each)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Images) and self._each == other._each:
            return True
        return isinstance(other, (Images, tuple)) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as an image has none

    def __repr__(self) -> str:
        return f"<{len(self)} images, decoded when they are used>"

    def __reduce__(self) -> tuple:
        return tuple, (list(self),)


Made = TypeVar("Made")


class Recent(Generic[Made]):
    """What was used last of what can be made again, `KEPT` bytes of it, by who owns it. It stays in its process.

    Args:
        n_bytes: of one.
    """

    def __init__(self, n_bytes: Callable[[Made], int]) -> None:
        self._made: OrderedDict[int, Made] = OrderedDict()
        self._n_bytes, self._bytes = n_bytes, 0
        self._lock = threading.RLock()  # a finalizer may run while it is held

    def of(self, owner: object) -> Made | None:
        """What is kept of an owner."""
        with self._lock:
            if id(owner) in self._made:
                self._made.move_to_end(id(owner))
            return self._made.get(id(owner))

    def keep(self, owner: object, made: Made) -> Made:
        """Keeps one; the owner calls `drop` with its id when it goes."""
        with self._lock:
            self.drop(id(owner))
            self._made[id(owner)] = made
            self._bytes += self._n_bytes(made)
            while len(self._made) > 1 and self._bytes > KEPT:
                self.drop(next(iter(self._made)))
        return made

    def drop(self, key: int) -> None:
        """Forgets what is kept of an owner."""
        with self._lock:
            made = self._made.pop(key, None)
            self._bytes -= 0 if made is None else self._n_bytes(made)


def _bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())


_DECODED = Recent(_bytes)


def _digest(image: Image.Image) -> bytes:
    return sha256(repr((image.mode, image.size)).encode() + image.tobytes()).digest()
