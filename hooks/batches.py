"""Prompts in batches that fit: no more rows than there is memory for, and half of them where that was too many.

What a row takes is an estimate, from the shapes of the model's parts; so half of what is free is given to it, and a
device that runs out of memory nevertheless is given half of the rows, then half of these. Numbers do not depend on it:
rows do not see one another.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from hooks.errors import FrankenlensError, one_line
from hooks.memory import NOT_WORTH_ASKING, in_words, limit, room_of
from hooks.opened import Opened
from hooks.shared import shared
from hooks.weights import d_mlp

Row = TypeVar("Row")
Found = TypeVar("Found")
AT_ONCE = {"cpu": 2**24, "cuda": 2**27}
"""Logits that exist together: 64 and 512 MiB in float32."""
LOGIT = 16
"""Bytes that a logit takes: as made, in float32, and twice in work on it."""
_FULL = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
"""What PyTorch's other errors say where there is no memory: libraries that take theirs beside its own."""
SHARE = 0.5
"""Of the memory that is free, for what is estimated."""


class MemoryRanOut(FrankenlensError):
    """There is no memory for what was asked at once; less at a time may fit."""


def batched(rows: Sequence[Row], batch_size: int) -> list[Sequence[Row]]:
    """The rows, `batch_size` at a time.

    Raises:
        FrankenlensError: `batch_size` is below 1, with which nothing would run and nothing be said.
    """
    require_batch_size(batch_size)
    return [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]


def require_batch_size(batch_size: int) -> None:
    """Refuses batches of nothing.

    Raises:
        FrankenlensError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise FrankenlensError(f"batch_size is {batch_size}; it must be at least 1")


def fitting(vlm: Opened, batch_size: int, of_row: int, what: str, whole: int = 0) -> int:
    """Rows that run together: `batch_size`, or as many as there is memory for.

    Args:
        vlm: the opened model.
        batch_size: at most.
        of_row: bytes that one row takes.
        what: is done, for the message of a refusal.
        whole: bytes that are taken once, however many rows there are.

    Raises:
        FrankenlensError: `batch_size` is below 1, or there is no memory for one row.
    """
    require_batch_size(batch_size)
    free = budget(vlm)
    if free is None:
        return batch_size
    rows = int((free - whole) // of_row)
    if rows >= 1:
        return min(batch_size, rows)
    whose = "free" if limit() is None else "allowed (--max-memory, memory_limit)"
    raise MemoryRanOut(
        f"{what} takes about {in_words(of_row + whole)} for one prompt, beside the models, and "
        f"{in_words(free)} of memory is {whose}. Give it more, or shorter prompts or traces."
    )


def lanes_fitting(vlm: Opened, most: int, of_lane: int, held: int) -> int:
    """Copies of a batch that run together, of which one was let in by `fitting`: at least one.

    Args:
        vlm: the opened model.
        most: of them.
        of_lane: bytes that one takes.
        held: bytes that are taken already.
    """
    if limit() is None and most * of_lane < NOT_WORTH_ASKING:
        return most
    free = budget(vlm)
    if free is None:
        return most
    left = free if limit() is None else free - held  # what is free is what is left
    return max(1, min(most, int(left // of_lane)))


def budget(vlm: Opened) -> int | None:
    """Bytes that estimates may add up to: the limit, else half of what is free; None where that is not known."""
    free = room_of(vlm)
    return free if free is None or limit() is not None else int(SHARE * free)


def forward_bytes(vlm: Opened, width: int) -> int:
    """What one row of so many tokens takes at its widest in a forward: the stream, one block, and a mask."""
    blocks = vlm.anatomy.text.blocks
    heads = max((block.n_heads * block.d_head for block in blocks), default=0)
    middle = [
        d_mlp(vlm.model, b) for b in blocks if (w := b.writer("mlp")) is not None and w.last is not None
    ]
    floats = width * (6 * vlm.d_model + 4 * heads + 3 * max(middle, default=4 * vlm.d_model))
    return floats * item_bytes(vlm) + width * width * (1 + item_bytes(vlm))


def cache_bytes(vlm: Opened, width: int) -> int:
    """What the keys and values of one row of so many tokens take in all blocks."""
    return sum(2 * b.n_kv_heads * b.d_head for b in vlm.anatomy.text.blocks) * width * item_bytes(vlm)


def logits_bytes(vlm: Opened, n_places: int) -> int:
    """What the logits of so many places take, made some at a time: as made, in float32, and twice in work on them."""
    return LOGIT * vlm.n_logits * min(n_places, at_once(vlm.n_logits, vlm.device))


def at_once(n_words: int, device: torch.device) -> int:
    """Places whose logits are made together; within a limit they take a quarter of it."""
    most, given = AT_ONCE.get(device.type, AT_ONCE["cpu"]), limit()
    if given is not None:
        most = min(most, given // (4 * LOGIT))
    return max(1, most // n_words)


def scores_bytes(vlm: Opened, width: int) -> int:
    """What the attention scores of one row in one block take, and the pattern that is made of them in float32."""
    heads = max((block.n_heads for block in vlm.anatomy.text.blocks), default=0)
    return 2 * heads * width * width * (4 + item_bytes(vlm))


def item_bytes(vlm: Opened) -> int:
    """Of one number of the model's."""
    return next(vlm.model.parameters()).element_size()


def in_parts(
    rows: Sequence[Row],
    size: int,
    run: Callable[[Sequence[Row]], Found],
    done: Callable[[Sequence[Row]], int] | None = None,
) -> Iterator[tuple[Sequence[Row], Found]]:
    """What `run` gives for `size` rows at a time, and for half of them, and half of these, where memory runs out.

    A run that is broken off is begun again: what it adds to anything must be added by the caller, of what it gives.

    Args:
        rows: what is run.
        size: at most so many together.
        run: gives something for some rows.
        done: how many of the rows that are left were run together when this was begun, the first of them among these;
            0 for none. They are `run` together again, whatever there is memory for today, so that it finds them.

    Raises:
        MemoryRanOut: memory runs out with one row.
        FrankenlensError: `size` is below 1.
    """
    for some in _split(rows, size, done):
        yield from _halved(some, run)


def in_shared_parts(
    what: str,
    rows: Sequence[Row],
    size: int,
    run: Callable[[Sequence[Row]], Found],
    done: Callable[[Sequence[Row]], int] | None = None,
) -> Iterator[tuple[Sequence[Row], Found]]:
    """`in_parts`, each by whichever process takes it first where several share the work (`hooks.shared`).

    Args:
        what: is done, for the progress bar of all.
        rows, size, done: as in `in_parts`.
        run: gives plain data of some rows, and changes nothing else.

    Raises:
        MemoryRanOut, FrankenlensError: as `in_parts`.
    """
    for _, found in shared(what, _split(rows, size, done), lambda some: list(_halved(some, run))):
        yield from found


def _split(
    rows: Sequence[Row], size: int, done: Callable[[Sequence[Row]], int] | None
) -> Iterator[Sequence[Row]]:
    require_batch_size(size)
    while rows:
        n = (done(rows) if done else 0) or size
        yield rows[:n]
        rows = rows[n:]


def _halved(
    rows: Sequence[Row], run: Callable[[Sequence[Row]], Found]
) -> Iterator[tuple[Sequence[Row], Found]]:
    done, found = _attempt(rows, run)
    if done:
        yield rows, found[0]
        return
    gc.collect()  # what the attempt held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(rows) + 1) // 2
    for some in (rows[:half], rows[half:]):
        yield from _halved(some, run)


def _attempt(rows: Sequence[Row], run: Callable[[Sequence[Row]], Found]) -> tuple[bool, list[Found]]:
    try:
        return True, [run(rows)]
    except MemoryRanOut:
        if len(rows) == 1:
            raise
        return False, []
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise MemoryRanOut(
                "memory ran out with one prompt at a time. Give shorter prompts or traces, fewer hook points, or "
                f"spread the models over more devices (--device-map). {one_line(error)}"
            ) from error
        return False, []


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device, or main memory, is full."""
    known = (MemoryRanOut, torch.OutOfMemoryError, MemoryError)
    return isinstance(error, known) or any(words in str(error) for words in _FULL)
