"""A model of the same architecture with weights that cost nothing, to be watched in place of one that is not run.

What a model is made of does not depend on its weights, so any that hide nothing will do. Every matrix of the model
built here is a Hankel matrix: entry (i, j) is number i + j of one random line. Its rows all differ, it has full rank,
and a matrix of 150,000 x 8,192 takes the memory of 158,192 numbers: a view with overlapping rows. Vectors and buffers
are drawn as transformers initializes them, and stirred, because unit norms, zero biases and shut gates hide parts.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

_STIRRED = 0.2
_SMALL = 1 << 12  # entries; tensors of more than one axis and at most so many are drawn as they are


def rebuilt(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    seed: int = 0,
    like: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A random model of a class and configuration, on the CPU, in fp32 and evaluation mode.

    Args:
        kind: class of the model.
        config: its configuration, which is not changed; quantization is left out.
        seed: of the weights.
        like: another such model, whose state dict this one shares; what it computes otherwise is its configuration's.

    Raises:
        ValueError: the state dict of `like` has other names or shapes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = weightless(kind, config)
        _draw(model)
    if like is not None:
        _share(model, like)
    return model.eval().requires_grad_(False)


def weightless(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a class and configuration on the meta device, without its quantization."""
    own: Any = deepcopy(config)
    if hasattr(own, "quantization_config"):
        del own.quantization_config
    own._attn_implementation = None  # the default, of every part
    with torch.device("meta"):
        return kind._from_config(own, dtype=torch.float32, experts_implementation="eager")


@torch.no_grad()
def _draw(model: PreTrainedModel) -> None:
    """Numbers for everything that is on the meta device."""
    drawn: dict[int, Tensor] = {}
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and parameter.ndim < 2:
                module._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
    model.initialize_weights()  # what is on the meta device stays there
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in drawn:
                drawn[id(parameter)] = _hankel(parameter) if parameter.is_meta else _stirred(parameter)
            module._parameters[name] = nn.Parameter(drawn[id(parameter)], requires_grad=False)
    model.tie_weights()


def _share(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Give a model the tensors of another's state dict."""
    wanted, given = model.state_dict(), other.state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (wanted, given)]
    if shapes[0] != shapes[1]:
        raise ValueError("the configurations make tensors of other names or shapes")
    model.load_state_dict(given, assign=True)


def _stirred(vector: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return vector + _STIRRED * torch.randn_like(vector)


def _hankel(matrix: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Numbers as large as keep outputs as large as inputs."""
    shape, scale = (
        matrix.shape,
        max(matrix[0].numel() if matrix.ndim != 3 else max(matrix.shape[1:]), 1) ** -0.5,
    )
    if matrix.numel() <= _SMALL:
        return scale * torch.randn(shape)
    line = scale * torch.randn(sum(shape) - len(shape) + 1)
    return line.as_strided(shape, (1,) * len(shape))
