"""From what a row holds to an image: a path, a data URI, base64, or bytes as `datasets` keeps them."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from interp.questions.images import as_seen, remarks
from interp.questions.readers.report import RowError, shown

KINDS = 'a path, a data URI, base64, or {"bytes": ..., "path": ...}'
"""What may stand for an image."""
LONG = 255  # bytes of a file's name, at most


def image_of(value: Any, root: Path) -> tuple[Image.Image, list[str]]:
    """The image that a value of a row stands for, as a model sees it, and what is to be remarked about it.

    Arguments:
        value: one of `KINDS`, or an image that somebody has opened already.
        root: folder that relative paths start from.

    Raises:
        RowError: says what is wrong with it.
    """
    name, source = _source(value, root)
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            seen = as_seen(image)
            return seen.copy() if seen is image else seen, remarks(image)  # the copy knows of no file
    except (
        Exception
    ) as error:  # Pillow's openers raise OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise RowError(f"image {name} cannot be read: {error}") from error


def _source(value: Any, root: Path) -> tuple[str, Path | BytesIO | Image.Image]:
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


def _is_image(data: bytes) -> bool:
    try:
        with Image.open(BytesIO(data)):
            return True
    except Exception:  # see `image_of`
        return False
