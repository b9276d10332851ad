"""What a block multiplies by before it adds: a number of the configuration, or the parameter that it is, by name.

Weights change under an open model (grafts), so a coefficient that is a parameter is named and never a number, however
it stood when the model was opened.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedVLM
from tests.architectures import TinyModel, build

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def fill(given: TinyModel, number: float, *words: str) -> int:
    """Set all parameters and buffers whose names end in one of these words; how many there are."""
    named = [*given.model.named_parameters(), *given.model.named_buffers()]
    found = [value for name, value in named if name.endswith(words)]
    for value in found:
        value.fill_(number)
    return len(found)


def coefficients(vlm: HookedVLM, tower: str) -> list[list[float | str]]:
    return [[w.coefficient for w in block.writers] for block in vlm.anatomy.towers[tower].blocks]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("number", (0.1, 1.0))
def test_equal_layer_scales_are_told_apart(number: float, dtype: torch.dtype) -> None:
    given = build("internvl", dtype=dtype)
    assert fill(given, number, "lambda_1", "lambda_2")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    layers = [f"model.vision_tower.encoder.layer.{n}" for n in range(len(vlm.anatomy.vision.blocks))]
    assert coefficients(vlm, "vision.") == [[f"{layer}.lambda_1", f"{layer}.lambda_2"] for layer in layers]
    if dtype != torch.float32:
        return
    fill(given, 0.3, "lambda_2")
    names = [f"vision.blocks.0.hook_{leaf}" for leaf in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    with torch.no_grad():
        _, cache = vlm.run_with_cache(given.inputs, names)
    pre, attn, mlp, post = (cache[name] for name in names)
    assert (post - pre - attn - mlp).abs().max().item() <= 1e-5 * max(1.0, post.abs().max().item())
    assert mlp.abs().max().item() > 0.1  # by a wrong scale, two thirds of it would be missing or too much


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_gain_that_is_one_is_a_gain(dtype: torch.dtype) -> None:
    given = build("gemma4", dtype=dtype)
    assert fill(given, 1.0, "layer_scalar")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    paths = [block.path for block in vlm.anatomy.text.blocks]
    assert [block.gain for block in vlm.anatomy.text.blocks] == [f"{path}.layer_scalar" for path in paths]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("number", (None, 0.01, 0.0))
def test_a_gate_is_known_by_its_tanh_however_far_it_is_open(number: float | None, dtype: torch.dtype) -> None:
    given = build("mllama", dtype=dtype)
    if number is not None:
        assert fill(given, number, "gate_attn", "gate_ffn")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    prefix = next(
        p for p, t in vlm.anatomy.towers.items() if t.path and "global_transformer" in t.blocks[0].path
    )
    for block, found in zip(vlm.anatomy.towers[prefix].blocks, coefficients(vlm, prefix), strict=True):
        assert found == [f"tanh({block.path}.gate_attn)", f"tanh({block.path}.gate_ffn)"]
    shut = f"{prefix}blocks.0.hook_mlp_out"
    if number == 0.0:
        assert "zero gate" in vlm.absent[shut]
    else:
        assert shut in vlm.hook_points


def test_gates_of_parts_inside_a_block_are_named_too() -> None:
    given = build("evolla")
    found = coefficients(HookedVLM(given.model, inputs=given.inputs), "")
    gates = [f"tanh(model.layers.1.adapter.gate_{part})" for part in ("attention", "ffw")]
    assert found[1] == [1.0, 1.0, *gates]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    ("name", "point"), (("granite", "blocks.1.hook_mlp_out"), ("internvl", "vision.blocks.1.hook_mlp_out"))
)
@torch.no_grad()
def test_a_scaled_output_set_to_zero_is_zero(name: str, point: str, dtype: torch.dtype) -> None:
    given = build(name, dtype=dtype)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    mid, post = (point.replace("mlp_out", f"resid_{end}") for end in ("mid", "post"))

    def zero_half(activation: Tensor, hook: Any) -> Tensor:
        activation[..., ::2] = 0
        return activation

    _, own = vlm.run_with_cache(given.inputs, [point, mid, post])
    with vlm.hooks([(point, zero_half)]):
        _, cache = vlm.run_with_cache(given.inputs, [point, mid, post])
    assert own[point][..., ::2].abs().max() > 0.1
    assert torch.equal(cache[post][..., ::2], cache[mid][..., ::2])
    assert torch.equal(cache[post][..., 1::2], own[post][..., 1::2])
    assert torch.equal(cache[point][..., ::2], torch.zeros_like(cache[point][..., ::2]))


@pytest.mark.parametrize("kept", (True, False))
def test_a_gradient_goes_through_a_scaled_output(kept: bool) -> None:
    """Against a plain hook on the module: through entries that a function leaves alone, and those that it changes."""
    given = build("granite")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    path = vlm.hook_points["blocks.1.hook_mlp_out"].module
    own = torch.tensor(1.0 if kept else 0.7, requires_grad=True)
    vlm.run_with_hooks(
        given.inputs, [("blocks.1.hook_mlp_out", lambda a, hook: a * own)]
    ).logits.sum().backward()
    plain = torch.tensor(1.0 if kept else 0.7, requires_grad=True)

    def scale_plainly(module: Any, args: Any, output: Any) -> Any:
        return output * plain

    handle = given.model.get_submodule(path).register_forward_hook(scale_plainly)
    given.model(**given.inputs).logits.sum().backward()
    handle.remove()
    assert own.grad is not None and plain.grad is not None
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-4, atol=1e-4)
    assert plain.grad.abs() > 1
