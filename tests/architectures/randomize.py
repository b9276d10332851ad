"""Weights drawn again, at a scale at which every part of a model matters.

Initializations of training hide what a test must see: unit norms, zero biases, gates that are shut, weights so small
that the image hardly moves the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPREAD = 0.2
TABLE = 0.4  # embeddings, positions
GATES = ("gate", "alpha", "scale", "lambda", "gamma", "multiplier")


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draws all parameters and all saved buffers of `model` again; the same seed, the same weights."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        saved = {name for name, _ in module.named_buffers(recurse=False)} - module._non_persistent_buffers_set
        for name, tensor in [
            *module.named_parameters(recurse=False),
            *((name, module.get_buffer(name)) for name in sorted(saved)),
        ]:
            if id(tensor) in done or not tensor.is_floating_point() or not tensor.numel():
                continue
            done.add(id(tensor))
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(_drawn(module, name, tensor, noise))


def _drawn(module: nn.Module, name: str, old: Tensor, noise: Tensor) -> Tensor:
    """Outputs as large as inputs for matrices, gains around 1, biases around 0, gates half open, the rest stirred."""
    if isinstance(module, nn.Embedding):
        return TABLE * noise
    if isinstance(module, nn.Linear) and name == "weight":
        return noise * old.shape[1] ** -0.5
    if isinstance(module, nn.modules.conv._ConvNd) and name == "weight":
        return noise * max(old[0].numel(), 1) ** -0.5
    wide = [size for size in old.shape if size > 1]
    low, high = float(old.min()), float(old.max())
    if len(wide) > 1 and not (low == high == 1.0):  # tables of positions, experts, Conv1D
        if "pos" in name or "embed" in name or "token" in name:
            return TABLE * noise
        return noise * max(old.shape[-2:]) ** -0.5
    if low == high == 0.0:
        shut = any(word in name for word in GATES) and "bias" not in name
        return 0.5 + 0.1 * noise if shut else SPREAD * noise
    if low == high and 0 < low < 0.5:  # a layer scale
        return 0.5 + SPREAD * noise
    if name == "running_var" or low == high == 1.0:
        return (1 + SPREAD * noise).clamp(min=0.3)
    if not torch.isfinite(old).all() or max(abs(low), abs(high)) > 1e4:
        return SPREAD * noise
    if isinstance(module, nn.Linear):
        return SPREAD * noise
    return old + SPREAD * noise
