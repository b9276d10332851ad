"""What a cell of the table may say, and when two numbers count as the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from hooks import FrankenlensError

YES, ABSENT, REFUSED, FAILS = "yes", "absent", "refused", "FAILS"
STATES = (YES, ABSENT, REFUSED, FAILS)
RELATIVE = 1e-5
RULED_OUT = -1e4
"""Logits below are words that a model rules out."""


@dataclass(frozen=True)
class Cell:
    """What was found.

    Attributes:
        state: of `STATES`.
        why: the reason; with "yes", where it holds or which longer way was taken.
        number: of "yes", the largest difference that was seen, in units of what is allowed.
        n: how many numbers, points or interventions were compared.
    """

    state: str
    why: str = ""
    number: float = 0.0
    n: int = 0


def finite(logits: Shaped[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """The words that are not ruled out."""
    return logits > RULED_OUT


def within(ours: Shaped[Tensor, "..."], theirs: Shaped[Tensor, "..."]) -> float:
    """The largest difference in units of 1e-5 x max(1, largest value); nan where a number is none."""
    if not ours.numel():
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    scale = max(1.0, theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0)
    same = ours == theirs
    off = torch.where(same, torch.zeros_like(ours), (ours - theirs).abs())
    return off.max().item() / (RELATIVE * scale)


def guarded(measure: Callable[[], Cell]) -> Cell:
    """What came of a measurement: a refusal is an answer, any other exception is a fault."""
    try:
        return measure()
    except FrankenlensError as refusal:
        return Cell(REFUSED, told(refusal))
    except Exception as fault:
        return Cell(FAILS, f"{type(fault).__name__}: {told(fault)}")


def told(error: Exception, length: int = 240) -> str:
    """An error's message on one line."""
    line = " ".join(str(error).split())
    return line if len(line) <= length else line[: length - 1] + "…"
