"""How many prompts of a sweep run together: as many as there is memory for, and half of them where that ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from hooks import HookedVLM
from hooks.batches import fitting, forward_bytes, in_parts, logits_bytes
from hooks.memory import memory_limit, point_bytes
from interp.sweep.batch import stored_bytes

Found = TypeVar("Found")


def rows_fitting(
    recipient: HookedVLM,
    kept: Sequence[tuple[HookedVLM, Iterable[str]]],
    width: int,
    batch_size: int,
    max_memory: int | None,
) -> int:
    """Prompts that run together: `batch_size`, or as many as there is memory for.

    Args:
        recipient: the model that is acted on; its streams, keys and values are stored.
        kept: models, and the hook points whose activations are kept of them.
        width: tokens of the longest prompt.
        batch_size: at most.
        max_memory: bytes; None: what is free, or what `memory_limit` allows.

    Raises:
        FrankenlensError: there is no memory for one prompt.
    """
    tokens = {"input_ids": torch.empty(1, width, device="meta")}
    cached = sum(
        point_bytes(vlm, vlm.point(name), tokens) for vlm, names in kept for name in dict.fromkeys(names)
    )
    of_row = cached + stored_bytes(recipient, width) + 2 * forward_bytes(recipient, width)
    with memory_limit(max_memory):
        return fitting(recipient, batch_size, of_row, "a sweep", logits_bytes(recipient, width))


def in_halves(
    number: int, rows: Sequence[int], some: Sequence[int], run: Callable[[Sequence[int], str], Found]
) -> Iterator[tuple[Sequence[int], Found]]:
    """What `run` gives for rows of a batch and their name, or for halves of them, by names of their own.

    Args:
        number: of the batch.
        rows: of it.
        some: of these, which are run.
        run: on some of them.
    """

    def named(those: Sequence[int]) -> Found:
        whole = len(those) == len(rows)
        return run(those, f"{number:05d}" if whole else f"{number:05d}-{rows.index(those[0])}-{len(those)}")

    yield from in_parts(some, len(some), named)
