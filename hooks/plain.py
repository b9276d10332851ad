"""The one place where a linear map's numbers are read: from the module that owns them, wherever they lie.

A weight may be offloaded (accelerate brings it when its module runs), wrapped (an adapter adds to it) or packed
(quantized). Who needs its numbers asks here, and is told where there are none to be had.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hooks.errors import FrankenlensError
from hooks.extras import require_installed
from hooks.resident.away import here


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module as it is when it runs, on the device where it does; None where it has none."""
    own = here(module._parameters.get(name))
    if own is None or not own.is_meta:
        return own
    if not hasattr(module, "_hf_hook"):
        return None
    require_installed("weights that are offloaded", "accelerate")
    from accelerate.utils import align_module_device

    with torch.no_grad(), align_module_device(module):
        brought = module._parameters[name]
        return None if brought is None or brought.is_meta else brought.detach()


def plain_weight(linear: nn.Module) -> Float[Tensor, "out in"] | None:
    """The matrix that a linear map multiplies with, on the device where it does.

    Args:
        linear: the module; the matrix of GPT-2's `Conv1D` is turned round.

    Returns:
        The matrix, not to be written to; where it is offloaded a copy of it, else a view. None where the module is no
        plain linear map: then its own forward alone knows (`by_forward`).
    """
    weight = own_parameter(linear, "weight") if type(linear) in (nn.Linear, Conv1D) else None
    if weight is None or not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
        return None
    return weight.detach().T if isinstance(linear, Conv1D) else weight.detach()


def by_forward(linear: Any, inputs: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead out"]:
    """What a linear map, wrapped or packed as it may be, makes of inputs without its bias: its own forward, past hooks,
    in the dtype that it computes in."""
    return linear.forward(inputs) - linear.forward(torch.zeros_like(inputs))


def matrix(linear: nn.Module, what: str) -> Float[Tensor, "out in"]:
    """As `plain_weight`, for whoever cannot do without.

    Raises:
        FrankenlensError: the module is wrapped or packed; `what` says for what it is needed.
    """
    weight = plain_weight(linear)
    if weight is None:
        raise FrankenlensError(
            f"{what} needs the numbers of a {type(linear).__name__}, which are wrapped or packed (an adapter, a "
            "quantized weight): merge the adapter, or load the model without quantization."
        )
    return weight
