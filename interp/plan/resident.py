"""What a pair with one model in memory takes: the entries in which RL differs, and the time of changing over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from hooks.errors import FrankenlensError
from hooks.resident import as_bits, change, piece_size, size_of
from hooks.stored.checkpoint import Checkpoint

TYPICAL = 0.2
"""Share of entries that differ, where nothing is known: reinforcement learning in bfloat16 changes 5 to 30 %."""
RUNS, LENGTH = 8, 4096
"""Runs of neighbouring entries of each tensor that are compared, and their length."""


@dataclass(frozen=True)
class Turning:
    """One memory for two models.

    Attributes:
        share: of the entries that differ.
        share_is: where the share is from, in words.
        changes: bytes of what differs.
        whole: bytes of a model.
        seconds: of one change over, where it was measured on this machine; None elsewhere.
    """

    share: float
    share_is: str
    changes: int
    whole: int
    seconds: float | None = None

    @property
    def moved(self) -> int:
        """Bytes read and written by one change over: what differs, and the weights in which it does."""
        return self.changes + (2 * self.whole if self.changes else 0)


def turning(model: Any, share: float, share_is: str, measured: bool) -> Turning:
    """Of a model without weights.

    Args:
        model: the model.
        share: of the entries that differ, the same everywhere.
        share_is: where it is from.
        measured: whether changing over is timed, on one piece on this machine.
    """
    sizes = [(one.numel(), one.element_size(), one.dtype) for one in model.parameters()]
    changes = sum(size_of(share, n, size) for n, size, _ in sizes)
    whole = sum(n * size for n, size, _ in sizes)
    seconds = _seconds(share, max(sizes)[2]) * sum(n for n, _, _ in sizes) if measured else None
    return Turning(share, share_is, changes, whole, seconds)


def measured_share(in_: str, rl: str, dtype: str) -> float | None:
    """The share of entries in which two checkpoints differ as they are loaded, on a sample of every tensor.

    None where one of them is not at hand as files.
    """
    if not (Path(in_).is_dir() and Path(rl).is_dir()):
        return None
    try:
        ours, theirs = Checkpoint(in_), Checkpoint(rl, in_)
    except FrankenlensError:  # configurations alone, or an adapter
        return None
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    differing = total = 0.0
    for name, stored in ours.tensors.items():
        if name in theirs.tensors:
            one, other = (c.sample(name, RUNS, LENGTH).to(wanted or stored.dtype) for c in (ours, theirs))
            differing += float((as_bits(one) != as_bits(other)).double().mean()) * stored.entries
            total += stored.entries
    return differing / total if total else None


def _seconds(share: float, dtype: torch.dtype, times: int = 5) -> float:
    """Of turning one entry: the least of some trials on a piece."""
    one, other = _two(share, dtype)
    found = change(as_bits(one), as_bits(other))
    if found is None:
        return 0.0
    return min(_trials(found, one, times)) / one.numel()


def _trials(found: Any, piece: Shaped[Tensor, " entry"], times: int) -> Iterator[float]:
    for _ in range(times):
        begun = time.perf_counter()
        found.turn(as_bits(piece))
        yield time.perf_counter() - begun


def _two(share: float, dtype: torch.dtype) -> tuple[Shaped[Tensor, " entry"], Shaped[Tensor, " entry"]]:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(piece_size(torch.device("cpu")), generator=generator).to(dtype)
    other = one.clone()
    as_bits(other)[torch.rand(len(one), generator=generator) < share] ^= 1
    return one, other
