"""Images of every kind: as transformers and datasets read them where they can, right or refused by name where not."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

import frankenlens as fl
from hooks.errors import FrankenlensError
from interp.questions.images import as_seen
from interp.questions.readers import read_jsonl, read_vision_function

NOISE = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
RAMP = np.arange(48, dtype=np.uint16).reshape(8, 6) * 1394  # 0 to 65518, of 16 bits


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def saved(path, image: Image.Image, **how) -> str:
    image.save(path, **how)
    return str(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
def test_orientation_is_that_of_transformers_and_datasets(kind, orientation, tmp_path):
    path = saved(tmp_path / f"a.{kind}", Image.fromarray(NOISE), exif=oriented(orientation))
    seen = np.asarray(as_seen(Image.open(path)))
    assert np.array_equal(seen, np.asarray(load_image(path)))
    assert np.array_equal(seen, np.asarray(datasets.Image().decode_example({"path": path, "bytes": None})))
    assert seen.shape == ((6, 8, 3) if orientation > 4 else (8, 6, 3))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_those_of_transformers(mode, tmp_path):
    image = Image.fromarray(NOISE).convert(mode)
    path = (
        saved(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), image)
        if mode not in ("YCbCr", "HSV")
        else ""
    )
    assert np.array_equal(np.asarray(as_seen(image)), np.asarray(image.convert("RGB")))
    if path:
        assert np.array_equal(np.asarray(as_seen(Image.open(path))), np.asarray(load_image(path)))


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "memory"])
def test_deep_grey_keeps_its_range(kind, tmp_path):
    image = Image.fromarray(RAMP)
    if kind != "memory":
        image = Image.open(saved(tmp_path / f"a.{kind}", image))
    seen = np.asarray(as_seen(image))
    assert (
        seen == (RAMP // 256)[..., None]
    ).all()  # pillow clips: all but the first fifth of a row would be white
    assert np.unique(np.asarray(load_image(image))).size == 2


def test_twelve_bits_are_not_a_sixteenth_as_bright(tmp_path):
    """A TIFF by hand: Pillow reads 12 bits, and does not write them."""
    values = [0, 1024, 2048, 4095]
    pixels = b"".join(
        struct.pack(">I", (a << 12 | b) << 8)[:3] for a, b in zip(values[::2], values[1::2], strict=True)
    )
    tags = [
        (256, 4),
        (257, 1),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, len(pixels)),
    ]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    where = 8 + len(pixels)
    file = struct.pack("<2sHI", b"II", 42, where) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(file)
    assert np.asarray(as_seen(Image.open(tmp_path / "a.tif")))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_numbers_without_a_known_white_are_refused(tmp_path):
    floats = Image.fromarray(np.linspace(0, 1, 48, dtype=np.float32).reshape(8, 6))
    integers = Image.fromarray(np.arange(48, dtype=np.int32).reshape(8, 6) * 5000)
    inverted = saved(tmp_path / "inverted.tif", Image.fromarray(RAMP), tiffinfo={262: 0})
    for image, what in (
        (Image.open(saved(tmp_path / "f.tif", floats)), "floating-point numbers .TIFF."),
        (floats, "floating-point numbers .in memory."),
        (Image.open(saved(tmp_path / "i.tif", integers)), "32-bit integers .TIFF."),
        (Image.open(inverted), "16-bit integers .TIFF."),
    ):
        with pytest.raises(
            FrankenlensError, match=f"{what}.*which of them is white; save it as 8-bit grey or RGB"
        ):
            as_seen(image)


def drawn(ink: int) -> Image.Image:
    """A bar of one colour on a transparent ground whose hidden colour is the same."""
    pixels = np.full((8, 6, 4), ink, np.uint8)
    pixels[..., 3] = 0
    pixels[2:4, :, 3] = 255
    pixels[6, :, 3] = 51
    return Image.fromarray(pixels)


def test_what_is_transparent_shows_white(tmp_path):
    palette = Image.fromarray(np.full((8, 6), 1, np.uint8), "L").convert("P")
    palette.paste(0, (0, 2, 6, 4))
    for image in (drawn(0), drawn(0).convert("LA"), Image.open(saved(tmp_path / "a.png", drawn(0)))):
        grey = np.asarray(as_seen(image))
        assert (grey[2:4] == 0).all() and (grey[0] == 255).all() and (grey[6] == 204).all()
        assert not np.asarray(load_image(image)).any()  # black on black
    palette = Image.new("P", (6, 8), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.paste(1, (0, 2, 6, 4))
    seen = np.asarray(as_seen(Image.open(saved(tmp_path / "p.png", palette, transparency=0))))
    assert (seen[2:4] == [200, 0, 0]).all() and (seen[0] == 255).all()
    opaque = Image.fromarray(np.dstack([NOISE, np.full((8, 6), 255, np.uint8)]))
    assert np.array_equal(np.asarray(as_seen(opaque)), NOISE)


@pytest.mark.parametrize("image", [drawn(255), Image.new("RGBA", (4, 4), (10, 20, 30, 0))])
def test_what_white_would_hide_is_refused(image):
    with pytest.raises(FrankenlensError, match="nothing of it is seen on white; lay it on the background"):
        as_seen(image)


def test_an_example_holds_what_is_seen_whoever_makes_it(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(NOISE), exif=oriented(6))
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "?", "answer": "1", "image": "a.png"}))
    (read,), _ = read_jsonl(tmp_path / "d.jsonl")
    made = fl.Example("mine", (Image.open(path),), "?", "1")
    assert made.images[0].size == (8, 6) and fl.fingerprint(made) == fl.fingerprint(read)
    plain = Image.fromarray(NOISE)
    assert fl.Example("mine", (plain,), "?", "1").images[0] is plain
    with pytest.raises(
        FrankenlensError,
        match="example 'mine', image 2 cannot be used: a ndarray is no image; give one of PIL",
    ):
        fl.Example("mine", (plain, NOISE), "?", "1")  # type: ignore[arg-type]


def test_both_images_of_a_pair_are_read_alike(tmp_path):
    (tmp_path / "images").mkdir()
    for name, how in (("t", {"exif": oriented(8)}), ("s", {})):
        saved(tmp_path / "images" / f"{name}.png", Image.fromarray(NOISE), **how)
    row = {
        "id": "1",
        "task": "counting",
        "target_image": "images/t.png",
        "source_image": "images/s.png",
        "prompt": "How many?",
        "meta": {"target_answer": "3", "source_answer": "4"},
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    ((target, source),), report = read_vision_function(tmp_path)
    assert (target.images[0].size, source.images[0].size) == ((8, 6), (6, 8))
    assert report.notes == ("in 1 of 1 pairs the images differ in size",)


def bomb() -> bytes:
    """A PNG that says it has 40,000 x 40,000 pixels, by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def test_whatever_stands_for_an_image_in_a_row(tmp_path):
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    frames = [Image.fromarray(np.roll(NOISE, i, 0)) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    saved(tmp_path / "see through.png", drawn(0))
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a.png").write_bytes(file.getvalue())
    given = [
        "a.png",
        text,
        f"data:image/png;base64,{text}",
        {"bytes": text, "path": None},
        {"bytes": None, "path": "a.png"},
        ["a.png", {"path": "see through.png"}],
        "moving.gif",
        "bomb.png",
        "empty.png",
        "folder.png",
        "https://example.com/a.png",
        "A" * 533_440,
        f"data:image/png;base64,{'A' * 400}",
        {"url": "a.png"},
        "",
        float("nan"),
    ]
    rows = [{"question": "?", "answer": "1", "image": image} for image in given]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples, report = read_jsonl(tmp_path / "d.jsonl")
    assert [example.meta["row"] for example in examples] == [1, 2, 3, 4, 5, 6, 7]
    assert all(np.array_equal(np.asarray(example.images[0]), NOISE) for example in examples[:6])
    assert np.array_equal(np.asarray(examples[6].images[0]), NOISE)
    reasons = {failure.row: failure.reason for failure in report.failures}
    for row, reason in {
        8: "bomb.png cannot be read: it has 40,000 × 40,000 pixels, and at most 100,000,000 are decoded",
        9: "empty.png cannot be read: cannot identify",
        10: "folder.png is no file",
        11: "is on the web; download it",
        12: "image '.*AAA'… .533,4.. characters. does not exist",
        13: "cannot be read",
        14: "an image must be a path, a data URI, base64",
        15: "found ''",
        16: "found nan",
    }.items():
        assert re.search(reason, reasons[row]), (row, reasons[row])
    assert max(map(len, reasons.values())) < 400
    assert report.notes == (
        "once: an image is transparent in places, which show white",
        "once: an image has several frames, of which the first is read",
    )
