"""Rows from a stranger: nothing outside of their folder, nothing that takes all memory; one bad row ends nothing."""

from __future__ import annotations

import base64
import copy
import gc
import io
import json
import os
import pickle
import resource
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.settings import DataSettings, load_examples
from hooks.errors import FrankenlensError
from interp.localization import folder_pairs
from interp.questions import Example, fingerprint, on_demand
from interp.questions.readers import Draw, pictures, read_jsonl


def picture(size: tuple[int, int] = (6, 4)) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", size).save(made, "PNG")
    return made.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for place in (tmp_path / "secret.png", tmp_path / "data" / "a.png"):
        place.write_bytes(picture())
    return tmp_path / "data"


def read(folder: Path, named: list[Any], **how: Any) -> dict[int, str]:
    rows = [
        {"id": f"r{i}", "image": image, "question": "what ?", "answer": "a"} for i, image in enumerate(named)
    ]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples, report = read_jsonl(folder / "d.jsonl", **how)
    assert len(examples) + len(report.failures) == len(named)
    return {failure.row: failure.reason for failure in report.failures}


def test_images_stay_in_their_folder(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "inner.png").symlink_to(folder / "a.png")
    outside = [
        "../secret.png",
        str(folder.parent / "secret.png"),
        "./../data/../secret.png",
        "link.png",
        {"path": "../secret.png"},
    ]
    inside = ["a.png", "./a.png", str(folder / "a.png"), "inner.png", "../data/a.png"]
    reasons = read(folder, [*inside, *outside])
    assert list(reasons) == [6, 7, 8, 9, 10]
    assert all("is outside of" in reason and "--images-anywhere" in reason for reason in reasons.values())
    assert read(folder, [*inside, *outside], images_anywhere=True) == {}
    assert list(read(folder, [*inside, *outside], images=folder.parent)) == [
        1,
        2,
        4,
        5,
        6,
        8,
        9,
        10,
    ]  # other names


def test_what_is_no_file_of_pixels_is_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch) run\n")
    before = time.monotonic()
    reasons = read(
        folder, ["a.png", "fifo.png", "folder.png", "x.eps", "a" * 300, "\0", "a.png/b", "/dev/zero"]
    )
    assert list(reasons) == [2, 3, 4, 5, 6, 7, 8] and time.monotonic() - before < 20
    assert "is no file" in reasons[2] and "is no file" in reasons[3] and "cannot identify" in reasons[4]


def test_the_limit_on_pixels_is_the_callers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "wide.png").write_bytes(picture((20_000, 1)))
    whole = picture((400, 300))
    inline = "data:image/png;base64," + base64.b64encode(whole).decode()
    limit = Image.MAX_IMAGE_PIXELS
    assert read(folder, ["a.png", inline, "wide.png"]) == {}
    reasons = read(folder, ["a.png", inline, "wide.png"], max_pixels=50_000)
    assert list(reasons) == [2] and "400 × 300 pixels, and at most 50,000" in reasons[2]
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow would raise beyond 20
    assert read(folder, ["a.png", inline]) == {} and Image.MAX_IMAGE_PIXELS == 10
    # a picture of 10^10 pixels is told by its header, before any of them is there
    header = whole[:16] + (100_000).to_bytes(4, "big") * 2 + whole[24:]
    huge = header[:29] + zlib.crc32(header[12:29]).to_bytes(4, "big") + header[33:]
    (folder / "huge.png").write_bytes(huge)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons = read(folder, ["huge.png", "a.png"])
    assert "100,000 × 100,000 pixels" in reasons[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert pictures.PIXELS == 100_000_000


BAD = [
    b'{"id": "b", "question": "caf\xe9 ?", "answer": "1"}',
    b'{"id": "c", "question": "q", "answer": ' + b"9" * 5000 + b"}",
    b'{"id": "d", "question": "q", "answer": "1", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"id": "e", "question": "q", "answer": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}",
    b'{"id": "f", "question": "q", "answer": "1", "grader": ["number"]}',
    b'{"id": "g", "question": "q", "answer": "1", "grader": {"a": 1}}',
    b'{"id": "h", "question": "q", "answer": "1", "grader": "number", "decimals": 30000000}',
    b'{"id": "i", "question": "q", "answer": "1", "grader": "number", "tolerance": "1e999999999"}',
    b'{"id": "j", "question": "q", "answer": "1", "grader": "number", "tolerance": 1e999}',
    b'{"id": "k", "question": "q", "answer": "1", "grader": "box", "iou": 7}',
    b'{"id": "l", "question": "q", "answer": "1", "grader": "choice", "choices": {"a": 1}}',
    b'{"id": "a", "question": "q", "answer": "1"}',
    b'{"id": {"a": []}, "question": "q", "answer": "1"}',
    b'{"id": ["a"], "question": "q", "answer": "1"}',
    b'{"question": "q", "answer": "' + b"9" * 64_000 + b'", "grader": "number"}',
    b'{"question": "q", "answer": "9^9^9^9", "grader": "number"}',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"null",
]


def test_one_bad_row_ends_nothing(tmp_path: Path) -> None:
    good = b'{"id": "a", "question": "two and two ?", "answer": "4", "grader": "number"}'
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([good, *BAD]))
    before = time.process_time()
    examples, left_out = load_examples(DataSettings(data=tmp_path / "d.jsonl"), seed=0)
    assert time.process_time() - before < 10
    assert [example.id for example in examples] == ["a"]
    assert sum(left_out.values()) == len(BAD)
    assert all(f"row {n}: " in " ".join(left_out) for n in range(2, len(BAD) + 2))
    assert all(len(reason) < 500 for reason in left_out)


def test_so_many_rows_are_decoded_as_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    decode = pictures.as_seen
    monkeypatch.setattr(pictures, "as_seen", lambda image: opened.append(image) or decode(image))
    rows = [{"id": str(i), "image": "a.png", "question": f"what {i} ?", "answer": "a"} for i in range(300)]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples, report = read_jsonl(folder / "d.jsonl", draw=Draw(4, 0))
    assert len(examples) == len(opened) == 4 and sum(report.passed.values()) == 296
    opened.clear()
    (folder / "counting").mkdir()
    rows = [
        {
            "id": str(i),
            "task": "counting",
            "prompt": "how many ?",
            "target_image": "a.png",
            "source_image": "a.png",
            "meta": {"target_answer": str(i), "source_answer": str(i + 1)},
        }
        for i in range(300)
    ]
    (folder / "counting" / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "counting" / "a.png").write_bytes(picture())
    pairs = folder_pairs(folder, ["counting"], 4)
    assert len(pairs.pairs) == 4 and len(opened) == 8
    assert pairs.left_out == {"counting: rows beyond the first 4 (--n)": 296}


def test_pairs_stay_in_their_folder(folder: Path) -> None:
    (folder / "counting").mkdir()
    row = {
        "id": "1",
        "task": "counting",
        "prompt": "how many ?",
        "target_image": "../a.png",
        "source_image": "../a.png",
    }
    row |= {"meta": {"target_answer": "1", "source_answer": "2"}}
    (folder / "counting" / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(FrankenlensError, match="is outside of .*--images-anywhere"):
        folder_pairs(folder, ["counting"], 4)
    assert len(folder_pairs(folder, ["counting"], 4, images_anywhere=True).pairs) == 1


# images are decoded when they are used


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two of the pictures."""
    monkeypatch.setattr(on_demand, "KEPT", 2 * 3 * 400 * 300)


def noise(folder: Path, n: int) -> list[Path]:
    rng, paths = np.random.default_rng(0), []
    for i in range(n):
        paths.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8)).save(paths[-1])
    return paths


def test_decoded_images_are_kept_up_to_a_limit_and_decoded_again(folder: Path, little: None) -> None:
    paths = noise(folder, 8)
    inline = "data:image/png;base64," + base64.b64encode(paths[0].read_bytes()).decode()
    assert read(folder, [path.name for path in paths]) == {}
    examples, _ = read_jsonl(folder / "d.jsonl")
    pixels = [np.asarray(Image.open(path)) for path in paths]
    for _ in range(2):
        for example, expected in zip(examples, pixels, strict=True):
            assert np.array_equal(np.asarray(example.images[0]), expected)
            assert on_demand._DECODED._bytes <= on_demand.KEPT
    made = [
        Example(e.id, (Image.open(p),), e.question, e.answer) for e, p in zip(examples, paths, strict=True)
    ]
    assert [fingerprint(one) for one in examples] == [fingerprint(one) for one in made]
    sent = pickle.loads(pickle.dumps(examples[0]))  # to another machine, which has no such file
    assert isinstance(sent.images, tuple) and sent == examples[0] == copy.deepcopy(examples[0])
    assert examples[0] != replace(examples[0], images=examples[1].images)
    assert read(folder, [inline]) == {}
    assert fingerprint(read_jsonl(folder / "d.jsonl")[0][0]) == fingerprint(made[0])
    del examples
    gc.collect()
    assert on_demand._DECODED._bytes == 0 and not on_demand._DECODED._made


def test_an_image_that_changes_or_goes_is_refused_when_it_is_used(folder: Path, little: None) -> None:
    paths = noise(folder, 4)
    assert read(folder, [path.name for path in paths]) == {}
    examples, _ = read_jsonl(folder / "d.jsonl")
    paths[0].write_bytes(paths[1].read_bytes())
    paths[1].unlink()
    with pytest.raises(FrankenlensError, match=r"image '0\.png' is another one than when the rows were read"):
        examples[0].images[0]
    with pytest.raises(FrankenlensError, match=r"1\.png does not exist; it could be read when the rows were"):
        examples[1].images[0]


def test_of_many_photos_four_are_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = noise(folder, 60)
    assert read(folder, [path.name for path in paths]) == {}
    opened: list[Any] = []
    own = pictures.as_seen
    monkeypatch.setattr(pictures, "as_seen", lambda image: opened.append(1) or own(image))
    examples, _ = load_examples(DataSettings(data=folder / "d.jsonl", n=4), 0)
    assert len(examples) == 4 and len(opened) == 4
