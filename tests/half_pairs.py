"""Pairs in half precision whose RL changed 12 % of the entries, mostly small ones, as training by RL does."""

import copy

import torch

from hooks import HookedVLM
from tests.families import tiny

HALVES = [torch.bfloat16, torch.float16]
SHARE = 0.12


def nudged(weight: torch.Tensor, share: float = SHARE, seed: int = 0) -> torch.Tensor:
    """Weights after small steps in float32, of one size for all of them, of which this share survives rounding.

    As in training by RL with small steps, those that survive are mostly at small weights.
    """
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    digits = {torch.bfloat16: 8, torch.float16: 11}[weight.dtype]
    gaps = torch.exp2(torch.frexp(weight.float()).exponent - digits)  # to the next number of the type
    size = (gaps / noise.abs() / 2).quantile(share)
    return (weight.float() + size * noise).to(weight.dtype)


def half_pair(dtype: torch.dtype, family: str = "qwen2_5_vl") -> tuple[HookedVLM, HookedVLM]:
    """IN and RL."""
    given = tiny(family)
    in_ = given.model.to(dtype).requires_grad_(False)
    rl = copy.deepcopy(in_)
    for i, parameter in enumerate(rl.parameters()):
        parameter.copy_(nudged(parameter, seed=i))
    return HookedVLM(in_, given.processor, check=False), HookedVLM(rl, given.processor, check=False)


def widened(pair: tuple[HookedVLM, HookedVLM]) -> tuple[HookedVLM, HookedVLM]:
    """The same pair in float32."""
    in_, rl = (copy.deepcopy(vlm.model).float() for vlm in pair)
    return HookedVLM(in_, pair[0].processor, check=False), HookedVLM(rl, pair[0].processor, check=False)
