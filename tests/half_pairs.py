"""Pairs in half precision whose RL changed 12 % of the entries, each by one unit in the last place, as RL does."""

import copy

import torch

from hooks import HookedVLM
from tests.families import tiny

HALVES = [torch.bfloat16, torch.float16]
SHARE = 0.12


def nudged(weight: torch.Tensor, share: float = SHARE, seed: int = 0) -> torch.Tensor:
    """A share of the entries moved to a neighbour, up or down in size; zeros stay."""
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(weight.shape, generator=generator) < share) & (weight != 0)
    step = 2 * torch.randint(0, 2, weight.shape, generator=generator) - 1
    bits = weight.contiguous().view(torch.int16) + (step * chosen).to(torch.int16)
    return bits.view(weight.dtype)


def half_pair(dtype: torch.dtype, family: str = "qwen2_5_vl") -> tuple[HookedVLM, HookedVLM]:
    """IN and RL."""
    given = tiny(family)
    in_ = given.model.to(dtype).requires_grad_(False)
    rl = copy.deepcopy(in_)
    for i, parameter in enumerate(rl.parameters()):
        parameter.copy_(nudged(parameter, seed=i))
    return tuple(HookedVLM(model, given.processor, check=False) for model in (in_, rl))


def widened(pair: tuple[HookedVLM, HookedVLM]) -> tuple[HookedVLM, HookedVLM]:
    """The same pair in float32."""
    models = (copy.deepcopy(vlm.model).float() for vlm in pair)
    return tuple(HookedVLM(model, pair[0].processor, check=False) for model in models)
