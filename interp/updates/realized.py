"""Updates of weights: what was asked for, what the weights hold of it in their own type, and whether it will do.

Weights in half precision hold 8 (bfloat16) or 11 (float16) significant bits. An update of RL is often one unit in the
last place of the entries that changed, so that half of it rounds to all or to nothing, and one that is spread over all
entries (a low-rank form) rounds away. Nothing written here is rounded in silence: each update is computed in float32,
stored once, and measured (`Realized`).

What is not what it says is refused rather than dithered. Rounding at random keeps the mean, but with half a unit asked
for it stores 1.41 times the norm at a cosine of 0.71, which is no more a dose than rounding to nearest is; a wider copy
of the model inside the context would be read beside runs in another precision. The way out is a pair opened in float32,
all models of it. Only random updates, whose direction is nobody's, are brought to their norm (`interp.updates.drawn`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import FrankenlensError

NORM_WITHIN = 0.1
"""How far the norm of a stored update may be from the norm asked for, as a share of it."""
LEAST_COSINE = 0.95
"""The least cosine of a stored update to the one asked for: at it, a tenth of what is stored is noise (by energy)."""
LEAST_SHARE = 0.9
"""The least share of the entries that must lie in tensors which hold their own part of an update."""
_SUMS = ("asked", "stored", "product", "entries", "held")


@dataclass(frozen=True)
class Realized:
    """What weights hold of updates; those of several tensors are added (`+`).

    Norm and cosine are of all tensors together, as one vector. A few tensors of large weights may stand for most of its
    norm, and hold theirs, where the matrices hold nothing of theirs; so the share of the entries is kept, too, that lie
    in tensors which hold their own part.

    Attributes:
        asked, stored: squared norm of the update that was asked for, and of the change of the weights.
        product: their scalar product.
        entries: of the tensors that were to change.
        held: of those of them in which norm and cosine are what they should be.
        directed: whether a direction was asked for; not where all updates are random.
    """

    asked: float = 0.0
    stored: float = 0.0
    product: float = 0.0
    entries: int = 0
    held: int = 0
    directed: bool = False

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        before: Float[Tensor, "*shape"],
        after: Float[Tensor, "*shape"],
        update: Float[Tensor, "*shape"],
        directed: bool = True,
    ) -> Realized:
        """Of one tensor, before and after an update was written; sums in float64."""
        change = after.to(update.device, update.dtype) - before.to(update)
        sums = (dot(update, update), dot(change, change), dot(change, update))
        alone = cls(*sums, directed=directed)
        n = update.numel() if alone.asked or alone.stored else 0
        return replace(alone, entries=n, held=n if alone._is_close else 0)

    def __add__(self, other: Realized) -> Realized:
        sums = (getattr(self, name) + getattr(other, name) for name in _SUMS)
        return Realized(*sums, directed=self.directed or other.directed)

    @property
    def norm_ratio(self) -> float:
        """|stored| / |asked|; 1 where nothing was asked for and nothing changed."""
        if not self.asked:
            return math.inf if self.stored else 1.0
        return math.sqrt(self.stored / self.asked)

    @property
    def cosine(self) -> float:
        """Of the stored update to the one asked for; 1 where both are 0, 0 where one is."""
        if not (self.asked and self.stored):
            return float(self.asked == self.stored)
        return self.product / math.sqrt(self.asked * self.stored)

    @property
    def share(self) -> float:
        """Of the entries, those in tensors that hold their own part; 1 where nothing was to change."""
        return self.held / self.entries if self.entries else 1.0

    @property
    def _is_close(self) -> bool:
        close = abs(self.norm_ratio - 1) <= NORM_WITHIN
        return close and (self.cosine >= LEAST_COSINE or not self.directed)

    def lacking(self, dtype: torch.dtype) -> str:
        """Why this is not what was asked for; "" where it is.

        Args:
            dtype: of the weights.
        """
        if self._is_close and self.share >= LEAST_SHARE:
            return ""
        direction = (
            f", at a cosine of {self.cosine:.2f} to it (needed: {LEAST_COSINE})" if self.directed else ""
        )
        return (
            f"weights in {type_name(dtype)} hold {self.norm_ratio:.2f} of its norm (needed: {1 - NORM_WITHIN:g} to "
            f"{1 + NORM_WITHIN:g}){direction}, and tensors with {self.share:.0%} of the entries hold their part "
            f"(needed: {LEAST_SHARE:.0%})"
        )

    def require(self, what: str, dtype: torch.dtype, but: str = "") -> None:
        """Refuse an update that is not what was asked for.

        Args:
            what: the update.
            dtype: of the weights.
            but: how the caller is told to take it all the same.

        Raises:
            FrankenlensError: names the update, what is held of it, and the ways out.
        """
        if why := self.lacking(dtype):
            raise FrankenlensError(f"{what}: {why}. {way_out(but)}")


def way_out(but: str = "") -> str:
    """What to do about rounding."""
    other = f", or take it as it is: {but}" if but else ""
    return f"Open the pair in dtype='float32' (of a command: --dtype float32){other}."


def type_name(dtype: torch.dtype) -> str:
    """E.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def wide_type(*tensors: Tensor) -> torch.dtype:
    """What an update of such weights is computed in: float32, or wider where they are."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def rounded(own: Float[Tensor, "*shape"], update: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The weights after an update, rounded once, to nearest, to their own type."""
    return (own.to(update) + update).to(own.dtype)


def dot(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """Scalar product, in float64, a million entries at a time."""
    pieces = zip(a.flatten().split(1 << 20), b.flatten().split(1 << 20), strict=True)
    return sum(float(x.double() @ y.double()) for x, y in pieces)
