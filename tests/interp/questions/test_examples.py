"""What an example is told by: hashed once, and never for other pixels or another question."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from interp.questions.examples import Example, cluster_of, fingerprint
from interp.questions.images import as_seen
from interp.questions.on_demand import Images, OnDemand


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8))


def on_demand(folder: Path, seed: int) -> Images:
    file = folder / f"{seed}.png"
    picture(seed).save(file)
    return Images([OnDemand(lambda: as_seen(Image.open(file)), as_seen(Image.open(file)), file.name)])


def by_hand(example: Example) -> tuple[str, str]:
    """Fingerprint and cluster: SHA-256 of question and answer, and of the pixels with their mode and size."""
    pixels = b"".join(
        repr((one.mode, one.size)).encode() + np.asarray(one).tobytes() for one in example.images
    )
    asked = repr((example.question, example.answer)).encode()
    return (
        hashlib.sha256(asked + pixels).hexdigest(),
        f"images {hashlib.sha256(pixels).hexdigest()[:16]}",
    )


def told(example: Example) -> tuple[str, str]:
    return fingerprint(example), cluster_of(example)


COPIES: dict[str, Callable[[Example], Example]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda example: pickle.loads(pickle.dumps(example)),
    "replace": lambda example: replace(example, id="another name"),
}


@pytest.mark.parametrize("kind", ["in memory", "on demand"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_told_by_what_it_holds_itself(tmp_path: Path, way: str, kind: str) -> None:
    images = on_demand(tmp_path, 0) if kind == "on demand" else (picture(0), picture(1))
    example = Example("e", images, "how many ?", "3")
    assert told(example) == by_hand(example)
    other = COPIES[way](example)
    assert told(other) == told(example) == by_hand(other)
    # what is known of one serves neither a copy with other pixels, nor one that asks something else
    for changed in (
        replace(other, images=(picture(2),)),
        replace(other, question="how few ?"),
        replace(other, answer="4"),
    ):
        assert told(changed) == by_hand(changed) != told(example)
    assert told(other) == told(example)


def test_pixels_of_a_deep_copy_are_its_own() -> None:
    example = Example("e", (picture(0),), "how many ?", "3")
    before = told(example)
    other = copy.deepcopy(example)
    other.images[0].putpixel((0, 0), (1, 2, 3))
    assert told(other) == by_hand(other) != before
    assert told(example) == before == by_hand(example)


def test_images_that_are_exchanged_in_an_example_are_hashed_anew() -> None:
    example = Example("e", (picture(0),), "how many ?", "3")
    before = told(example)
    object.__setattr__(example, "images", (picture(2),))
    assert told(example) == by_hand(example) != before


def test_pixels_are_hashed_once_for_a_fingerprint_and_once_for_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example = Example("e", (picture(0),), "how many ?", "3")
    seen = []
    own = Image.Image.tobytes
    monkeypatch.setattr(Image.Image, "tobytes", lambda self, *rest: seen.append(self) or own(self, *rest))
    for _ in range(3):
        told(example)
    assert len(seen) == 2
