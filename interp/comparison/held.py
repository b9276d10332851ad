"""Matrices of checkpoints as blocks that can be gone through again and again: from memory as stored, or from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.stored.checkpoint import Checkpoint
from interp.comparison.passes import Blocks
from interp.comparison.singular_values import is_small

HELD = 192 << 20  # bytes: a larger tensor is read from disk once a pass
_BLOCK = 1 << 20  # entries of a block


def held(checkpoint: Checkpoint, name: str) -> Blocks:
    """A matrix of a checkpoint, in the type it is stored in."""
    stored = checkpoint.tensors[name]
    if stored.entries * stored.dtype.itemsize > HELD:
        return lambda: checkpoint.blocks(name, _BLOCK)
    whole = checkpoint.read(name).view(stored.matrix or (-1, 1))
    tall = whole if whole.shape[0] >= whole.shape[1] else whole.T.contiguous()
    del whole
    return lambda: iter(tall.split(max(1, _BLOCK // tall.shape[1])))


def difference(before: Blocks, after: Blocks, shape: Sequence[int]) -> Blocks:
    """After - before: in float64 where the matrix is decomposed as it is, or one of the two is; else in float32."""
    small = is_small(shape)

    def blocks() -> Iterator[Float[Tensor, "_long _short"]]:
        for one, two in zip(before(), after(), strict=True):
            wide = torch.float64 if small or torch.float64 in (one.dtype, two.dtype) else torch.float32
            yield two.to(wide) - one.to(wide)

    return blocks
