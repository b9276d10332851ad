"""The type in which values of checkpoints count as unchanged."""

from __future__ import annotations

import torch


def counted_in(*stored: torch.dtype) -> torch.dtype:
    """The type in which a value counts as unchanged: the coarsest of those it is stored in.

    float32 and wider are counted in bfloat16, in which such a checkpoint is run: as stored, hardly an entry that
    training touched is the same.
    """
    return torch.float16 if torch.float16 in stored and torch.bfloat16 not in stored else torch.bfloat16
