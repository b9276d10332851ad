"""What differs between two processors: what they make of images and of a text with images, beside the words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hooks.processors import tokenizer_of
from interp.pair.agreement.difference import (
    Difference,
    Setting,
    acting,
    named,
    said,
    settings,
    unequal,
    with_settings,
)
from interp.pair.agreement.words import template_differences, tokenizer_differences

_NAMES = frozenset(
    "processor_class image_processor_type feature_extractor_type video_processor tokenizer chat_template auto_map "
    "_processor_class name_or_path tokenizer_file transformers_version".split()
)
"""Names of classes and places, which differ between image backends and machines; parts that are compared as such; and
what reads videos, which no prompt holds."""
_SIZES = ((64, 64), (30, 90), (300, 200), (7, 9))
_LARGEST = 4096  # a side; limits beyond its square are not tried


def processor_differences(a: Any, b: Any, templates: bool = True) -> list[Difference]:
    """What differs in tokens, tokenization, image settings and, with `templates`, what the chat template writes.

    A setting enters if the first processor makes other tensors of a prompt with it: of small and large images, of one
    beyond every limit on which the two do not agree.
    """
    found = tokenizer_differences(tokenizer_of(a), tokenizer_of(b))
    if a is not tokenizer_of(a):  # a text-only model has its tokenizer alone
        found += _of_settings(a, b)
    return [*found, *(template_differences(a, b) if templates else ())]


def _of_settings(a: Any, b: Any) -> list[Difference]:
    ours, theirs = (
        {one: v for one, v in settings(processor.to_dict()) if _NAMES.isdisjoint(one)} for processor in (a, b)
    )
    which = unequal(ours, theirs)
    if not which:
        return []
    limits = [v for one in which for v in (ours.get(one), theirs.get(one)) if _is_whole(v)]
    images = [*_images(limits)]
    own = [_tensors(a, image) for image in images]
    beyond = [
        one for one in which if any(_is_whole(v.get(one)) and v[one] > _LARGEST**2 for v in (ours, theirs))
    ]

    def act(some: Sequence[Setting]) -> bool:
        try:
            changed = with_settings(a, theirs, some, tokenizer_of(a))
        except Exception:  # a class may refuse what another one has
            return True
        return any(
            not _alike(made, _tensors(changed, image)) for made, image in zip(own, images, strict=True)
        )

    blind = all(isinstance(made, str) for made in own)
    live = which if blind else [*beyond, *acting([one for one in which if one not in beyond], act)]
    return [
        Difference(named(one), f"processor setting {said(one, ours, theirs)}", one in live) for one in which
    ]


def _images(limits: Sequence[int]) -> Iterator[Image.Image]:
    """Small images, and where two limits differ one that is larger than the larger, be they sides or areas."""
    sides = list(_SIZES)
    for limit in sorted(set(limits)):
        if max(map(max, _SIZES)) < limit <= _LARGEST:
            sides.append((int(limit) + 64, 256))
        elif _LARGEST < limit <= _LARGEST**2:
            side = int(limit**0.5) + 64
            sides.append((side, side))
    rng = np.random.default_rng(0)
    for height, width in sides:
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _tensors(processor: Any, image: Image.Image) -> Mapping[str, Any] | str:
    """What a prompt with an image becomes, or why it becomes nothing."""
    token = getattr(processor, "image_token", None) or getattr(tokenizer_of(processor), "image_token", "")
    try:
        with warnings.catch_warnings():  # of settings that are to have another name
            warnings.simplefilter("ignore")
            made = processor(text=[f"{token} a b"], images=[[image]], return_tensors="pt")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return dict(made)


def _alike(a: Mapping[str, Any] | str, b: Mapping[str, Any] | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    if set(a) != set(b):
        return False
    return all(_equal(a[name], b[name]) for name in a)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else str(a) == str(b)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
