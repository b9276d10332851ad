"""From what a row holds to an image: a path, a data URI, base64, or bytes as `datasets` keeps them."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from interp.questions.images import as_seen, remarks
from interp.questions.on_demand import Images, OnDemand
from interp.questions.readers.report import RowError, shown

KINDS = 'a path, a data URI, base64, or {"bytes": ..., "path": ...}'
"""What may stand for an image."""
LONG = 255  # bytes of a file's name, at most
FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "ICO",
    "TGA",
    "SGI",
    "QOI",
    "ICNS",
    "DIB",
    "DDS",
    "PCX",
    "PSD",
)
"""Formats of files that are opened: of pixels. PostScript and its like are programs, which Pillow has others run."""
PIXELS = 100_000_000
"""Pixels of an image that is decoded, by default at most: 300 MB."""


@dataclass(frozen=True)
class Access:
    """Which images of rows are opened.

    Attributes:
        anywhere: files outside of the folder of images, too.
        pixels: of an image that is decoded, at most.
    """

    anywhere: bool = False
    pixels: int = PIXELS


def images_of(values: Sequence[Any], root: Path, access: Access | None = None) -> tuple[Images, list[str]]:
    """The images that values of a row stand for, and what is to be remarked about them.

    Each is decoded once, so that a row whose image cannot be read is told now, and again when it is used.

    Arguments and errors: as `image_of`.
    """
    each: list[OnDemand] = []
    said: list[str] = []
    for value in values:
        first, some = image_of(value, root, access)
        each.append(OnDemand(partial(_image, value, root, access), first, _named(value)))
        said += some
    return Images(each), said


def _image(value: Any, root: Path, access: Access | None) -> Image.Image:
    return image_of(value, root, access)[0]


def _named(value: Any) -> str:
    return "in a row" if isinstance(value, (bytes, Image.Image)) else shown(value)


def image_of(value: Any, root: Path, access: Access | None = None) -> tuple[Image.Image, list[str]]:
    """The image that a value of a row stands for, as a model sees it, and what is to be remarked about it.

    Arguments:
        value: one of `KINDS`, or an image that somebody has opened already.
        root: folder that relative paths start from.
        access: what may be opened.

    Raises:
        RowError: says what is wrong with it.
    """
    access = access or Access()
    name, source = _source(value, root, access.anywhere)
    try:
        with _opened(source) as image:
            if image.width * image.height > access.pixels:
                raise ValueError(
                    f"it has {image.width:,} × {image.height:,} pixels, and at most {access.pixels:,} are decoded "
                    "(--max-pixels, in Python max_pixels=)"
                )
            seen = as_seen(image)
            return seen.copy() if seen is image else seen, remarks(image)  # the copy knows of no file
    except (
        Exception
    ) as error:  # Pillow's openers raise OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise RowError(f"image {name} cannot be read: {error}") from error


@contextmanager
def _opened(source: Path | BytesIO | Image.Image) -> Iterator[Image.Image]:
    """An image of a known format; the limit on its size is the caller's, not Pillow's."""
    if isinstance(source, Image.Image):
        yield source
        return
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(source, formats=known) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _source(value: Any, root: Path, anywhere: bool) -> tuple[str, Path | BytesIO | Image.Image]:
    """What to call an image in a message, and where it is."""
    if isinstance(value, Image.Image):
        return "in the row", value
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value) and not set(value) - {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return f"of {len(value):,} bytes in the row", BytesIO(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"an image must be {KINDS}, found {shown(value)}")
    if value.startswith(("http://", "https://")):
        raise RowError(f"image {shown(value)} is on the web; download it, and name the file instead")
    if value.startswith("data:"):
        head, _, text = value.partition(",")
        found = _decoded(text) if head.endswith(";base64") else None
        if found is None:
            raise RowError(f"image {shown(value)} is a data URI without base64 data")
        return shown(value), BytesIO(found)
    path = root / value
    name = str(path) if len(value) < LONG else shown(value)
    if os.path.exists(path):
        if not anywhere and not _is_inside(path, root):
            raise RowError(
                f"image {name} is outside of {root}, and rows may name only what is in there: give "
                "another folder (--images), or say that they may (--images-anywhere, in Python images_anywhere=True)"
            )
        if not os.path.isfile(path):
            raise RowError(f"image {name} is no file")
        return name, path
    found = _decoded(value)
    if found is None or not _is_image(found):
        raise RowError(f"image {name} does not exist")
    return shown(value), BytesIO(found)


def _decoded(text: str) -> bytes | None:
    """What stands there in base64; None where it is none."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        return None


def _is_inside(path: Path, root: Path) -> bool:
    """Whether a path leads, links followed, to something in a folder."""
    folder = os.path.realpath(root)
    return os.path.commonpath([folder, os.path.realpath(path)]) == folder


def _is_image(data: bytes) -> bool:
    try:
        with _opened(BytesIO(data)):
            return True
    except Exception:  # see `image_of`
        return False
