"""Images that are decoded when they are used: a photo of 12 megapixels is 4 MB in its file, and 36 MB as pixels."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, overload

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


class _Decoded:
    """The images that were used last. They stay in their process."""

    def __init__(self) -> None:
        self._images: OrderedDict[int, Image.Image] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()  # a finalizer may run while it is held

    def of(self, one: OnDemand) -> Image.Image | None:
        with self._lock:
            if id(one) in self._images:
                self._images.move_to_end(id(one))
            return self._images.get(id(one))

    def keep(self, one: OnDemand, image: Image.Image) -> Image.Image:
        with self._lock:
            self.drop(id(one))
            self._images[id(one)] = image
            self._bytes += _bytes(image)
            while len(self._images) > 1 and self._bytes > KEPT:
                self.drop(next(iter(self._images)))
        return image

    def drop(self, key: int) -> None:
        with self._lock:
            image = self._images.pop(key, None)
            self._bytes -= 0 if image is None else _bytes(image)


_DECODED = _Decoded()


def _bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())


def _digest(image: Image.Image) -> bytes:
    return sha256(repr((image.mode, image.size)).encode() + image.tobytes()).digest()
