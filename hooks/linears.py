"""Products with a weight by oneDNN: in float32, MKL leaves half of what some processors can do unused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hooks.uninterrupted import Uninterrupted

STEP, ROWS = 16, 128
"""A layer's product goes to oneDNN if its rows are a multiple of the first, or at least the second, then rounded up by
an eighth at most: of every number of rows oneDNN keeps half a megabyte of code."""
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(
    x: Float[Tensor, "*lead inner"],
    w: Float[Tensor, "column inner"],
    bias: Float[Tensor, " column"] | None = None,
) -> Float[Tensor, "*lead column"]:
    """X W^T + b, without gradients; in float32 on a CPU by oneDNN, where PyTorch has it.

    W may lie in any order; X may not, or oneDNN would be slow.
    """
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return functional.linear(x, w, bias)


@contextmanager
def by_onednn(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The linear layers inside these modules multiply by `product` until the context ends, where that is faster.

    Results differ from the layers' own by rounding. Left alone: layers of another class (adapters, quantized) or with
    a `forward` of their own (offloaded), and whatever carries gradients or is cast by autocast.
    """
    if not (_ONEDNN and torch.backends.mkldnn.enabled):
        yield
        return
    layers = [one for module in modules for one in module.modules() if _is_plain(one)]
    try:
        with Uninterrupted():
            for layer in layers:
                layer.__dict__["forward"] = _Forward(layer)
        yield
    finally:
        try:
            _give_back(layers)
        except KeyboardInterrupt:
            _give_back(layers)
            raise


def _is_plain(module: Any) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.dtype == torch.float32
    )


def _give_back(layers: Sequence[nn.Module]) -> None:
    with Uninterrupted():
        for layer in layers:
            layer.__dict__.pop("forward", None)


class _Forward:
    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, input: Tensor) -> Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        plain = (
            type(input) is Tensor and type(weight) in (Tensor, nn.Parameter) and weight.dtype == input.dtype
        )
        if (
            not plain
            or not weight.is_contiguous()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return functional.linear(input, weight, bias)
        rows = input.numel() // max(1, input.shape[-1])
        if not rows or not input.is_contiguous() or (rows % STEP and rows < ROWS):
            return functional.linear(input, weight, bias)
        return _in_few_shapes(input, weight, bias, rows)


def _in_few_shapes(
    x: Float[Tensor, "*lead inner"],
    w: Float[Tensor, "column inner"],
    bias: Float[Tensor, " column"] | None,
    rows: int,
) -> Float[Tensor, "*lead column"]:
    """`product`, with rows added up to a number that others share too: eight in every doubling."""
    step = max(STEP, (1 << rows.bit_length()) >> 4)
    more = -rows % step
    if not more:
        return product(x, w, bias)
    padded = x.new_empty(rows + more, x.shape[-1])
    padded[:rows] = x.view(rows, -1)
    padded[rows:] = 0
    return product(padded, w, bias)[:rows].view(*x.shape[:-1], -1)
