"""Quantized weights: their numbers mean nothing without their scales."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hooks import FrankenlensError, HookedVLM, weight_slices
from interp.transfer import Graft, grafted
from interp.transfer.grafts import require_graftable
from tests import architectures


class Packed(torch.nn.Parameter):
    """As a library's own kind of quantized weight."""


@pytest.mark.parametrize("kind", ["a type of a library", "whole numbers", "one byte"])
def test_packed_weights_have_no_rows_and_go_into_no_graft(kind: str) -> None:
    given = architectures.build("llama")
    model: Any = given.model
    vlm, donor = (HookedVLM(m, inputs=given.inputs) for m in (model, copy.deepcopy(model)))
    with grafted(vlm, donor, Graft(("blocks.1.mlp",))):
        pass
    linear = model.get_submodule(vlm.anatomy.text.blocks[1].writers[1].last)
    weight = linear.weight.detach()
    packed = {
        "a type of a library": Packed(weight, requires_grad=False),
        "whole numbers": torch.nn.Parameter((weight * 100).to(torch.int8), requires_grad=False),
        "one byte": torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False),
    }
    linear.weight = packed[kind]
    with pytest.raises(FrankenlensError, match=r"is packed .*Load the model without quantization"):
        weight_slices(model, vlm.anatomy, "blocks.1.mlp.neuron.3")
    for pair in ((vlm, donor), (donor, vlm)):
        with pytest.raises(FrankenlensError, match="blocks.1.mlp names .* is packed"):
            require_graftable(*pair, [Graft(("blocks.1.mlp",))])
    assert weight_slices(model, vlm.anatomy, "blocks.0.mlp.neuron.3")
