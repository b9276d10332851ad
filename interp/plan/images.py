"""How large the images of some prompts are to a vision tower: from their tensors, or from how many tokens they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from hooks import HookedVLM
from interp.prompts import Prompt
from interp.prompts.pairing import image_grid


@dataclass(frozen=True)
class Pictures:
    """The images of some rows.

    Attributes:
        patches: of each image, as the tower's blocks see them.
        tokens: of each image, as the decoder sees them.
        classes: whether the tower puts one more patch before each image's.
        window: patches that look at one another, in blocks that have windows; None: all of an image.
        whole: blocks in which all patches of an image do nevertheless.
    """

    patches: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    classes: bool = False
    window: int | None = None
    whole: tuple[int, ...] = ()

    @property
    def embedded(self) -> int:
        """Patches that pixels are made into."""
        return sum(self.patches) - self.classes * len(self.patches)

    def looked_at(self, layer: int) -> list[int]:
        """The lengths of what looks at itself in a block of the tower."""
        if self.window is None or layer in self.whole:
            return list(self.patches)
        parts = [[self.window] * (n // self.window) + [n % self.window] for n in self.patches]
        return [n for part in parts for n in part if n]


def pictures_of(vlm: HookedVLM, prompts: Sequence[Prompt]) -> Pictures:
    """The images of prompts, for one model.

    Args:
        vlm: the model; its weights may be on the meta device.
        prompts: with tensors of a processor, or with roles alone: each run of image tokens is then one image.
    """
    config: Any = vlm.model.config
    own: Any = getattr(config, "vision_config", None)
    if own is None:
        return Pictures()
    merged, whole = _merged(config, own), _whole_image(config, own)
    classes = any(name.endswith("class_embedding") for name, _ in vlm.model.named_parameters())
    patches, tokens = [], []
    for prompt in prompts:
        grid = image_grid(prompt.inputs)
        runs = [len(list(run)) for role, run in groupby(prompt.roles) if role == "image"]
        if grid is not None and grid.shape[-1] == 3:
            sizes = grid.prod(-1).tolist()
        elif whole is not None:
            sizes = [whole] * round(sum(runs) * merged / whole)
        else:
            sizes = [round(n * merged) for n in runs]
        patches += [size + classes for size in sizes]
        tokens += [round(size / merged) for size in sizes]
    return Pictures(tuple(patches), tuple(tokens), classes, _window(own), _whole_blocks(own))


def _merged(config: Any, own: Any) -> float:
    """Patches that are one token."""
    if (fixed := getattr(config, "mm_tokens_per_image", None)) and (whole := _grid(own)):
        return whole / fixed
    side = getattr(own, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1
    return float(side) ** 2


def _whole_image(config: Any, own: Any) -> int | None:
    """Patches of every image, where the tower takes one size alone."""
    return None if getattr(own, "spatial_merge_size", None) else _grid(own)


def _grid(own: Any) -> int | None:
    size, patch = getattr(own, "image_size", None), getattr(own, "patch_size", None)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else None


def _window(own: Any) -> int | None:
    """Patches of a window (Qwen2.5-VL)."""
    side, patch = getattr(own, "window_size", None), getattr(own, "patch_size", None)
    listed = getattr(own, "fullatt_block_indexes", None)
    return None if listed is None or not side or not patch else (side // patch) ** 2


def _whole_blocks(own: Any) -> tuple[int, ...]:
    return tuple(getattr(own, "fullatt_block_indexes", None) or ())
