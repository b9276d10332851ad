"""What a tensor was, bit for bit, without keeping it: known again after casts too."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types that a model is cast to (`model.to`, `.float()`, `.bfloat16()`, `.half()`)."""
_WIDER = {
    torch.float32: (torch.float64,),
    torch.bfloat16: (torch.float64, torch.float32),
    torch.float16: (torch.float64, torch.float32),
}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """A tensor's digest, and those of what casts that lose bits make of it.

    Attributes:
        digests: type to digest: the tensor's own, and each that does not hold all of its values.
    """

    digests: Mapping[torch.dtype, bytes]

    @classmethod
    def of(cls, tensor: Shaped[Tensor, "..."]) -> Fingerprint:
        """Of a tensor as it is now; reads it once for every type."""
        return cls({dtype: digest(tensor.detach().to(dtype)) for dtype in _lossy(tensor.dtype)})

    def fits(self, tensor: Shaped[Tensor, "..."]) -> bool:
        """Whether these are the same bits, or what casts of them to this type give (one, or one and another)."""
        tensor = tensor.detach()
        if tensor.dtype in self.digests and digest(tensor) == self.digests[tensor.dtype]:
            return True
        for dtype, known in self.digests.items():
            if dtype == tensor.dtype:
                continue
            back = tensor.to(dtype)
            if same_bits(back.to(tensor.dtype), tensor) and digest(back) == known:
                return True
        return False


def casts(kept: Shaped[Tensor, "..."], to: Shaped[Tensor, "..."]) -> Iterator[Shaped[Tensor, "..."]]:
    """What casts make of kept values in the type and on the device of another tensor: one cast, or one and another."""
    yield kept.to(to)
    if kept.is_floating_point():
        yield from (kept.to(dtype).to(to) for dtype in _lossy(kept.dtype)[1:])


def _lossy(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """A type, and those that do not hold all of its values."""
    if dtype not in PRECISIONS:
        return (dtype,)
    return dtype, *(one for one in PRECISIONS if one != dtype and one not in _WIDER.get(dtype, ()))


def same_bits(a: Shaped[Tensor, "..."], b: Shaped[Tensor, "..."]) -> bool:
    """Whether two tensors of one shape and type hold the same bits (NaN equals itself, 0 is not -0)."""
    kind = _BITS[a.element_size()]
    return torch.equal(a.detach().view(kind), b.detach().view(kind))


def digest(tensor: Shaped[Tensor, "..."]) -> bytes:
    """SHA-256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").digest()


def bit_sum(tensor: Shaped[Tensor, "..."]) -> int:
    """The sum of a tensor's bits read as whole numbers, on its own device: fast, and other after any ordinary write."""
    return int(tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64))
