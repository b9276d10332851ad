"""Images as a model sees them, wherever they come from: upright, RGB, eight bits a channel."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hooks.errors import FrankenlensError

_FULL_RANGE = {"I;16": (None, "PNG", "PPM", "JPEG2000"), "I": ("PNG", "PPM")}
"""Of which files (None: made in memory) the grey values of a mode run from 0 to 65535."""


def as_seen(image: Any) -> Image.Image:
    """An image as `transformers.image_utils.load_image` gives it to a model: turned as its EXIF data say, then RGB.

    What that function clips or blackens is treated so: 16-bit grey keeps its high byte, as Pillow does with 16-bit
    colours; what is transparent shows white. Of an animation it is the frame at which the image stands, which is the
    first of a file that was just opened.

    Arguments:
        image: a PIL image of any mode; not changed.

    Returns:
        The same object where there is nothing to do.

    Raises:
        FrankenlensError: no image; one that cannot be decoded; numbers of which it is not known which is white; or
            nothing that could be seen on white.
    """
    if not isinstance(image, Image.Image):
        raise FrankenlensError(
            f"a {type(image).__name__} is no image; give one of PIL (Image.open, Image.fromarray)"
        )
    try:
        image.load()
        bits = _bits(image)
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if bits > 8:
            image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
        if image.has_transparency_data:
            return _on_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except (FrankenlensError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise FrankenlensError(str(error) or type(error).__name__) from error


def remarks(image: Image.Image) -> list[str]:
    """What `as_seen` decides about an image, in words that fit many of them."""
    made = []
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:  # type: ignore[index]
        made.append("an image is transparent in places, which show white")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's JPEG with its previews
        made.append("an image has several frames, of which the first is read")
    return made


def _bits(image: Image.Image) -> int:
    """Of a channel: 8, or of grey values more, where it is known which of them is white."""
    mode, form = image.mode, image.format
    if mode not in ("I", "F") and not mode.startswith("I;16"):
        return 8
    if form == "TIFF" and mode.startswith("I;16"):
        tags = image.getexif()
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 1:  # 0: the largest number is black
            return int(tags.get(ExifTags.Base.BitsPerSample, 16))  # scanners and cameras write 12 as well
    elif form in _FULL_RANGE.get(mode[:4], ()) and "transparency" not in image.info:
        return 16
    what = {"F": "floating-point numbers", "I": "32-bit integers"}.get(mode, "16-bit integers")
    raise FrankenlensError(
        f"its pixels are {what} ({form or 'in memory'}), and it is not known which of them is white; save it as 8-bit "
        "grey or RGB"
    )


def _on_white(image: Image.Image) -> Image.Image:
    """Without its alpha channel."""
    with_alpha = image.convert("LA") if image.mode == "La" else image
    with_alpha = with_alpha.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    seen = Image.alpha_composite(white, with_alpha).convert("RGB")
    alpha = with_alpha.getchannel("A").getextrema()
    if alpha[0] < 255 and all(low == 255 for low, _ in seen.getextrema()):  # type: ignore[misc]
        raise FrankenlensError(
            "what it shows is transparent or white, and nothing of it is seen on white; lay it on the background that "
            "is meant, and save it as RGB"
        )
    return seen
