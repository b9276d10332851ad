"""Heads whose attention is added times a factor: what they are shown to write is what reaches the stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedVLM
from interp.metrics import LogitDifference
from interp.prompts import Prompt
from interp.sweep import Intervention, sweep
from interp.sweep.activations import activation_of
from tests.architectures import build
from tests.hooks.reference import tolerance

FACTORS = {"granite": "", "internvl": "vision."}
"""A number from the configuration, and one parameter for each channel."""


@pytest.mark.parametrize("name", FACTORS)
@torch.no_grad()
def test_heads_sum_to_what_their_attention_adds(name: str) -> None:
    given = build(name)
    vlm, inputs = HookedVLM(given.model, inputs=given.inputs), given.inputs
    block = f"{FACTORS[name]}blocks.0"
    results, added = f"{block}.attn.hook_result", f"{block}.hook_attn_out"
    assert vlm.hook_points[added].coefficient != 1.0
    _, cache = vlm.run_with_cache(inputs, [results, added])
    out: Any = vlm.module(vlm.hook_points[results].module)
    made = cache[results].sum(-2)
    if out.bias is None:
        assert (made - cache[added]).abs().max() <= tolerance(cache[added])
    else:  # the bias is no head's: the same for all tokens
        left = cache[added] - made
        assert (left - left[:, :1]).abs().max() <= tolerance(cache[added])

    def silent(result: Tensor, hook: Any) -> Tensor:
        return torch.cat([torch.zeros_like(result[..., :1, :]), result[..., 1:, :]], dim=-2)

    with vlm.hooks([(results, silent)]):
        _, changed = vlm.run_with_cache(inputs, [added])
    change = cache[added] - changed[added]
    assert (change - cache[results][..., 0, :]).abs().max() <= tolerance(cache[added])
    assert change.abs().max() > 100 * tolerance(cache[added])
    again = activation_of(vlm, lambda hook: vlm.run_with_cache(inputs, [hook])[1][hook], results, 0)
    assert (again - cache[results][..., 0, :]).abs().max() <= tolerance(cache[added])


@torch.no_grad()
def test_a_sweep_moves_a_head_as_far_as_a_full_forward_does() -> None:
    """Granite's factor stands behind W_O: the shortcut and a hook on the whole model agree."""
    given = build("granite")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    name = "blocks.1.attn.hook_result"
    prompt = Prompt.from_inputs(given.inputs, ["question"] * given.inputs["input_ids"].shape[1])
    value = torch.randn(vlm.d_model, generator=torch.Generator().manual_seed(0))

    def put(result: Tensor, hook: Any) -> Tensor:
        new = result.clone()
        new[..., 0, :] = value
        return new

    def measured(logits: Tensor) -> float:
        return float(logits[0, -1, 2] - logits[0, -1, 7])

    bare = given.model(**given.inputs).logits
    moved = vlm.run_with_hooks(given.inputs, [(name, put)]).logits
    one = Intervention(name, "replace", "all", index=0, value=value)
    difference = LogitDifference(torch.tensor([2]), torch.tensor([7]))
    swept = float(sweep(vlm, [prompt], [one], difference, progress=False)["value"].squeeze())
    assert abs(swept - measured(moved)) <= tolerance(bare)
    assert abs(swept - measured(bare)) > 100 * tolerance(bare)
