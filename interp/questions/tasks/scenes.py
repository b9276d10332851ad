"""Synthetic scenes: coloured shapes on a 4x4 grid, drawn into 56x56 pixels.

A scene is a layout (what is in each of the 16 cells) and a style seed (jitter, shade and pixel noise).
Two scenes with the same style seed differ only where their layouts differ.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from hooks.errors import FrankenlensError

Split = Literal["train", "validation", "test", "map"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "green": (45, 200, 65),
    "blue": (55, 85, 240),
    "yellow": (235, 220, 50),
    "purple": (190, 70, 215),
}
SHAPES = ("circle", "square", "triangle", "cross")
GRID = 4
CELLS = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcd")
"""Cell names in reading order: a1 b1 c1 d1 a2 ... d4."""
TILE = 14  # pixels
IMAGE_SIZE = GRID * TILE
SPLITS: dict[Split, tuple[int, int]] = {
    "train": (0, 70),
    "validation": (70, 80),
    "test": (80, 90),
    "map": (90, 100),
}
"""Percentiles of the layout's checksum that belong to each split."""

_EMPTY = 0
_MAX_JITTER = 2  # pixels
_MAX_SHADE = 20  # of 255
_MAX_NOISE = 14  # of 255
_RGB = np.array(list(COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene."""

    cell: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What is where, and how it is drawn.

    Attributes:
        layout: 16 codes in reading order; 0 is empty, else 1 + colour index * 4 + shape index.
        style: seed of jitter, shade and noise.
    """

    layout: tuple[int, ...]
    style: int

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """The shapes in reading order of their cells."""
        return tuple(
            SceneObject(CELLS[index], *decode(code)) for index, code in enumerate(self.layout) if code
        )


def encode(colour: str, shape: str) -> int:
    """Layout code of an object."""
    return 1 + list(COLOURS).index(colour) * len(SHAPES) + SHAPES.index(shape)


def decode(code: int) -> tuple[str, str]:
    """Colour and shape of a non-empty layout code."""
    colour, shape = divmod(code - 1, len(SHAPES))
    return tuple(COLOURS)[colour], SHAPES[shape]


def split_of(layout: tuple[int, ...]) -> Split:
    """The one split that a layout belongs to, decided by a checksum of the layout alone."""
    percentile = zlib.crc32(bytes(layout)) % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= percentile < high)


def sample_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Draws scenes until one falls into `split`: 5 to 10 objects, colours and shapes unevenly frequent.

    Raises:
        FrankenlensError: if `split` is unknown.
    """
    if split not in SPLITS:
        raise FrankenlensError(f"there is no split {split!r}, only {', '.join(SPLITS)}")
    while True:
        n = int(rng.integers(5, 11))
        cells = rng.permutation(GRID * GRID)[:n]
        colours = _uneven(rng, len(COLOURS), n)
        shapes = _uneven(rng, len(SHAPES), n)
        layout = [_EMPTY] * (GRID * GRID)
        for cell, colour, shape in zip(cells.tolist(), colours.tolist(), shapes.tolist(), strict=True):
            layout[cell] = 1 + colour * len(SHAPES) + shape
        if split_of(tuple(layout)) == split:
            return Scene(tuple(layout), int(rng.integers(2**32)))


def render(scene: Scene) -> Image.Image:
    """Draws one scene as a 56x56 RGB image."""
    return Image.fromarray(render_batch([scene])[0])


def render_batch(scenes: list[Scene]) -> UInt8[np.ndarray, "scene height width rgb"]:
    """Draws scenes; pixel for pixel what `render` draws one by one."""
    styles = [_style(scene.style) for scene in scenes]
    jitter = np.stack([style[0] for style in styles])
    shade = np.stack([style[1] for style in styles])
    noise = np.stack([style[2] for style in styles])
    codes = np.array([scene.layout for scene in scenes])
    colour, shape = np.divmod(np.maximum(codes - 1, 0), len(SHAPES))
    alpha = _masks()[shape, jitter[..., 0], jitter[..., 1]] * (codes > 0)[..., None, None]
    paint = (_RGB[colour] + shade)[:, :, None, None, :]
    ground = _background()[None, :, None, None, :]
    tiles = ground + alpha[..., None] * (paint - ground)
    tiles = tiles.reshape(len(scenes), GRID, GRID, TILE, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
    pixels = tiles.reshape(len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3) + noise
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _uneven(rng: np.random.Generator, kinds: int, n: int) -> Int[np.ndarray, " n"]:
    """n draws from a distribution over `kinds` that is itself drawn: counts then spread widely."""
    return np.searchsorted(np.cumsum(rng.dirichlet(np.ones(kinds)))[:-1], rng.random(n))


def _style(
    seed: int,
) -> tuple[Int[np.ndarray, "cell 2"], Int[np.ndarray, "cell 3"], Int[np.ndarray, "height width 3"]]:
    # Drawn for every cell, occupied or not, so that a changed object leaves all else as it was.
    rng = np.random.default_rng(seed)
    jitter = rng.integers(0, 2 * _MAX_JITTER + 1, (GRID * GRID, 2))
    shade = rng.integers(-_MAX_SHADE, _MAX_SHADE + 1, (GRID * GRID, 3))
    noise = rng.integers(-_MAX_NOISE, _MAX_NOISE + 1, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.int8)
    return jitter, shade, noise


@lru_cache(maxsize=1)
def _background() -> Float[np.ndarray, "cell rgb"]:
    # A tint encodes the place: vision towers with rotary positions see only relative ones.
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    return np.stack([30 + 25 * row, 30 + 25 * column, np.full(GRID * GRID, 70)], -1).astype(np.float32)


@lru_cache(maxsize=1)
def _masks() -> Float[np.ndarray, "shape dy dx height width"]:
    """Coverage in [0, 1] of every shape at every jitter, by 4x4 supersampling."""
    fine = 4
    axis = (np.arange(TILE * fine) + 0.5) / fine - TILE / 2
    masks = np.zeros((len(SHAPES), 2 * _MAX_JITTER + 1, 2 * _MAX_JITTER + 1, TILE, TILE), dtype=np.float32)
    for dy in range(2 * _MAX_JITTER + 1):
        for dx in range(2 * _MAX_JITTER + 1):
            y, x = np.meshgrid(axis - (dy - _MAX_JITTER), axis - (dx - _MAX_JITTER), indexing="ij")
            inside = {
                "circle": x**2 + y**2 < 4.6**2,
                "square": (abs(x) < 4.2) & (abs(y) < 4.2),
                "triangle": (y < 4.2) & (y > -4.2) & (abs(x) < (y + 4.6) * 0.55),
                "cross": ((abs(x) < 1.4) & (abs(y) < 4.6)) | ((abs(y) < 1.4) & (abs(x) < 4.6)),
            }
            for index, shape in enumerate(SHAPES):
                masks[index, dy, dx] = inside[shape].reshape(TILE, fine, TILE, fine).mean((1, 3))
    return masks
