"""Random updates as large as a given one, in any type of weights: the control beside an update."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from interp.updates.realized import dot, rounded

_CLOSE = 0.01  # of the norm: rounding that takes less than this is left as it is
_DOUBLINGS = 60
_FITTED = 16  # entries that are picked one by one, after those that are drawn


def random_update(
    delta: Float[Tensor, "*shape"], dtype: torch.dtype, seed: int | torch.Generator
) -> Float[Tensor, "*shape"]:
    """A random update of the same norm.

    For weights in half precision the update's own entries, shuffled: a Gaussian of that norm would mostly round away.
    Some of these round too, at weights that are larger than those they came from: see `as_large`.
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    if dtype in (torch.float16, torch.bfloat16):
        order = torch.randperm(delta.numel(), generator=generator).to(delta.device)
        return delta.flatten()[order].view_as(delta)
    noise = torch.randn(delta.shape, generator=generator).to(delta)
    size = noise.norm()
    return noise * (delta.norm() / size) if size else noise


@torch.no_grad()
def as_large(
    own: Float[Tensor, "*shape"], update: Float[Tensor, "*shape"], seed: int
) -> Float[Tensor, "*shape"]:
    """Weights after a random update, changed by its norm although they round.

    Where rounding takes (or adds) more than 1 % of the norm, the update is doubled (or halved) as often as it takes to
    pass it, and of the last two, entries drawn at random are taken from either, as many as make up the norm. A vector
    of few changed entries may not make it up; a Gaussian update, which may change all of them, is tried there too.

    Args:
        own: weights before, in any type.
        update: in float32 or wider; of random direction, so that what its entries are is free, and their size is not.
        seed: of the draw.
    """
    target = dot(update, update)
    made = _scaled(own, update, target, seed)
    off = _off(own, made, update, target)
    if off <= _CLOSE:
        return made
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(update.shape, generator=generator).to(update)
    other = _scaled(own, noise * (math.sqrt(target) / noise.norm()), target, seed)
    return other if _off(own, other, update, target) < off else made


def _off(own: Tensor, new: Tensor, update: Tensor, target: float) -> float:
    return abs(math.sqrt(_moved(own, new, update) / target) - 1) if target else 0.0


def _scaled(own: Tensor, update: Tensor, target: float, seed: int) -> Tensor:
    """Weights changed by a multiple of the update, or by one multiple here and another there, by a squared norm."""
    here, times = rounded(own, update), 1.0
    size = _moved(own, here, update)
    if _off(own, here, update, target) <= _CLOSE:
        return here
    factor = 2.0 if size < target else 0.5
    for _ in range(_DOUBLINGS):
        times *= factor
        there = rounded(own, times * update)
        size_there = _moved(own, there, update)
        if (size_there >= target) == (factor > 1):
            return _between(own, here, there, target - size, update.dtype, seed)
        here, size = there, size_there
    return here


def _between(
    own: Tensor, here: Tensor, there: Tensor, missing: float, wide: torch.dtype, seed: int
) -> Tensor:
    """`here`, with as many entries of `there` as bring its squared change up (or down) by what is missing."""
    gain = _squares(own, there, wide) - _squares(own, here, wide)
    gain = gain.flatten() if missing > 0 else -gain.flatten()
    places = gain.nonzero()[:, 0]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    chosen = _making(gain, places[order.to(places.device)], abs(missing))
    mixed = here.flatten()
    mixed[chosen] = there.flatten()[chosen]
    return mixed.view_as(own)


def _making(gain: Tensor, places: Tensor, missing: float) -> Tensor:
    """The first of the places, as many as do not exceed what is missing, and the largest ones that still fit."""
    sums = gain[places].cumsum(0)
    first = int((sums <= missing).sum())
    chosen, rest = places[:first], places[first:]
    left = missing - (float(sums[first - 1]) if first else 0.0)
    for _ in range(_FITTED):
        fitting = rest[gain[rest] <= left]
        one = fitting[gain[fitting].argmax()] if len(fitting) else None
        if one is None:
            if len(rest) and float(gain[rest].min()) < 2 * left:  # nearer than without it
                chosen = torch.cat([chosen, rest[gain[rest].argmin()][None]])
            break
        chosen, rest, left = torch.cat([chosen, one[None]]), rest[rest != one], left - float(gain[one])
    return chosen


def _squares(own: Tensor, new: Tensor, wide: torch.dtype) -> Tensor:
    return (new.to(wide) - own.to(wide)).double().square()


def _moved(own: Tensor, new: Tensor, update: Tensor) -> float:
    change = new.to(update) - own.to(update)
    return dot(change, change)
