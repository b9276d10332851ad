"""What is claimed of a model in bfloat16 and float16 is what is true of it, and no more than that.

The truth is written here by hand, or is what the same weights show in float32, where `test_architectures.py` holds it
against plain hooks. In bfloat16 one step of rounding is a hundredth: claims that are only nearly right are the ones
that must be refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from hooks import HookedVLM
from hooks.anatomy.precise import in_float32
from hooks.selfcheck import self_check
from hooks.selfcheck_writes import Writes, tolerance
from tests.architectures import ARCHITECTURES, TinyModel, build
from tests.families import FAMILIES, tiny

HALVES = (torch.bfloat16, torch.float16)
FAST = ("granite", "mllama", "mamba", "gemma2")
"""Multipliers, gates, streams in float32, soft caps; in bfloat16, which is the coarser."""


def cases(names: Iterable[str], fast: Iterable[str]) -> list[Any]:
    """Every name in both half precisions; what is not fast, and float16, only with the slow tests."""
    quick = {(name, torch.bfloat16) for name in fast}
    pairs = [(name, dtype) for name in names for dtype in HALVES]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


def state_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """What every module has noted down about itself, with the bits of its tensors."""
    return {
        (path, name): value.clone() if isinstance(value, Tensor) else id(value)
        for path, module in model.named_modules()
        for held in (module.__dict__, module._parameters, module._buffers)
        for name, value in held.items()
    }


@pytest.mark.parametrize(("name", "dtype"), cases(ARCHITECTURES, FAST))
def test_a_half_precision_model_is_what_it_is_in_float32(name: str, dtype: torch.dtype) -> None:
    exact, given = build(name), build(name, dtype=dtype)
    with torch.no_grad():
        bare = given.model(**given.inputs).logits
    before = state_of(given.model)
    vlm, wide = HookedVLM(given.model, inputs=given.inputs), HookedVLM(exact.model, inputs=exact.inputs)
    assert vlm.anatomy == wide.anatomy
    assert vlm.hook_points == wide.hook_points
    assert set(vlm.absent) == set(wide.absent)
    vlm.close()
    with torch.no_grad():
        assert torch.equal(given.model(**given.inputs).logits, bare)
    after = state_of(given.model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value, key


@pytest.mark.parametrize(("family", "dtype"), cases(FAMILIES, FAMILIES))
def test_a_family_in_half_precision_is_what_it_is_in_float32(family: str, dtype: torch.dtype) -> None:
    exact, given = tiny(family), tiny(family)
    given.model.to(dtype)
    inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in given.inputs().items()}
    vlm, wide = HookedVLM(given.model, inputs=inputs), HookedVLM(exact.model, inputs=exact.inputs())
    assert vlm.anatomy == wide.anatomy
    assert (vlm.hook_points, set(vlm.absent)) == (wide.hook_points, set(wide.absent))


def llama(kind: type[LlamaDecoderLayer], dtype: torch.dtype) -> TinyModel:
    given = build("llama", dtype=dtype)
    for layer in given.model.model.layers:
        layer.__class__ = kind
    return given


class Damped(LlamaDecoderLayer):
    """The stream itself is scaled: nothing is added to it as it is."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        middle = 0.996 * hidden_states + attended
        return middle + self.mlp(self.post_attention_layernorm(middle))


class Aside(LlamaDecoderLayer):
    """The norm before the MLP is given a copy: what is written there does not reach the stream."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        middle = hidden_states + attended
        return middle + self.mlp(self.post_attention_layernorm(middle.clone()))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_a_stream_that_is_nearly_carried_on_is_not_taken_for_one_that_is(dtype: torch.dtype) -> None:
    given = llama(Damped, dtype)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    assert not any(block.writers for block in vlm.anatomy.text.blocks)
    assert not [name for name in vlm.hook_points if name.endswith(("attn_out", "mlp_out", "resid_mid"))]
    assert "blocks.1.hook_resid_post" in vlm.hook_points


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_a_copy_of_the_stream_is_not_offered_as_the_stream(dtype: torch.dtype) -> None:
    given = llama(Aside, dtype)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    layers = range(vlm.n_layers)
    assert set(vlm.absent) == {f"blocks.{layer}.hook_resid_mid" for layer in layers}
    assert all("does not reach the stream" in why for why in vlm.absent.values())


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_a_coefficient_that_is_wrong_by_little_is_caught_at_every_point(dtype: torch.dtype) -> None:
    given = build("granite", dtype=dtype)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    scaled = [
        n for n, point in vlm.hook_points.items() if point.coefficient != 1.0 and point.place == "output"
    ]
    assert {vlm.hook_points[name].coefficient for name in scaled} == {0.5}  # its configuration's
    assert len(scaled) == 2 * vlm.n_layers
    for name in scaled:
        vlm.hook_points[name] = dataclasses.replace(vlm.hook_points[name], coefficient=0.49)
    absent = self_check(vlm, given.inputs).absent
    assert set(absent) >= set(scaled)
    assert all("is not the sum of what was read" in absent[name] for name in scaled)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("share", (0.1, 0.98))
def test_contributions_of_experts_that_are_wrong_are_caught(
    dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hooks.experts

    given = build("qwen3_moe", dtype=dtype)
    honest = hooks.experts.expert_contribution
    monkeypatch.setattr(hooks.experts, "expert_contribution", lambda *a, **k: share * honest(*a, **k))
    absent = HookedVLM(given.model, inputs=given.inputs).absent
    assert set(absent) == {"blocks.0.mlp.hook_expert_out", "blocks.2.mlp.hook_expert_out"}
    assert all("its sum over the experts" in why for why in absent.values())


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_experts_whose_output_is_doubled_behind_them_are_not_added_as_they_are(dtype: torch.dtype) -> None:
    given = build("minimax_m3_vl", dtype=dtype)
    assert given.model.config.text_config.routed_scaling_factor == 2.0
    writer = HookedVLM(given.model, inputs=given.inputs).anatomy.text.blocks[1].writer("moe")
    assert writer is not None and writer.experts is not None
    assert not writer.experts.added


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_scores_of_another_attention_than_the_models_are_absent(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hooks.attention

    given = build("gpt2", dtype=dtype)
    monkeypatch.setattr(hooks.attention, "_mask", lambda tap, module, scores, mask, kwargs: scores)
    absent = HookedVLM(given.model, inputs=given.inputs).absent
    blocks = range(given.model.config.n_layer)
    wrong = {f"blocks.{n}.attn.hook_{leaf}" for n in blocks for leaf in ("attn_scores", "pattern")}
    assert set(absent) == wrong
    assert all("other numbers than the model's own" in why for why in absent.values())


@pytest.mark.parametrize(("name", "dtype"), cases(("mistral_large4", "dots3_note"), ("mistral_large4",)))
def test_attention_that_chooses_its_keys_is_not_offered_as_any_other(name: str, dtype: torch.dtype) -> None:
    given = build(name, dtype=dtype)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    with torch.no_grad():
        bare = vlm(given.inputs).logits
        for point in (n for n in vlm.hook_points if n.startswith("blocks.0.attn.")):
            again = vlm.run_with_hooks(given.inputs, [(point, lambda a, hook: a.clone())]).logits
            assert (again - bare).abs().max() <= tolerance(bare), point
    assert bare.abs().max() > 4 * tolerance(bare)  # other keys move the logits by as much as they are


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_words_that_are_never_said_widen_no_tolerance(dtype: torch.dtype) -> None:
    given = build("chameleon", dtype=dtype)
    with torch.no_grad():
        bare = given.model(**given.inputs).logits
    assert bare.min() == torch.finfo(dtype).min  # the words of its images
    said = bare[bare > torch.finfo(dtype).min]
    assert tolerance(bare) == tolerance(said) < 1
    vlm = HookedVLM(given.model, inputs=given.inputs)
    seen: dict[str, list[Tensor]] = {}
    proof = Writes(vlm, given.inputs, bare)
    assert proof.back(["blocks.1.hook_mlp_out"], seen) == 0.0
    proof.bare = bare + 2 * proof.allowed * (bare > torch.finfo(dtype).min)
    assert proof.back(["blocks.1.hook_mlp_out"], seen) > proof.allowed


@pytest.mark.parametrize("dtype", HALVES)
def test_a_soft_cap_is_read_off_the_configuration_number_for_number(dtype: torch.dtype) -> None:
    given = build("gemma2", dtype=dtype)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    assert vlm.anatomy.softcap == given.model.config.final_logit_softcapping
    assert (vlm.anatomy.unembed, vlm.anatomy.final_norm) == ("lm_head", "model.norm")
    assert vlm.can("lens")


class FloatlessMLP(LlamaMLP):
    """A kernel that knows no float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            raise RuntimeError("only half precisions are implemented")
        return super().forward(x)


@torch.library.custom_op("frankenlens_tests::half_only", mutates_args=())
def half_only(x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        raise RuntimeError("only half precisions are implemented")
    return x * 2


class HalfKernelMLP(LlamaMLP):
    """One operation of it knows no float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(half_only(x))


def with_mlp(kind: type[LlamaMLP], dtype: torch.dtype) -> TinyModel:
    given = build("llama", dtype=dtype)
    for layer in given.model.model.layers:
        layer.mlp.__class__ = kind
    return given


@pytest.mark.parametrize("kind", (FloatlessMLP, HalfKernelMLP))
def test_what_does_not_run_in_float32_is_proved_in_its_own_precision(kind: type[LlamaMLP]) -> None:
    given = with_mlp(kind, torch.bfloat16)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    plain = HookedVLM(build("llama").model, inputs=given.inputs)
    assert [block.writers for block in vlm.anatomy.text.blocks] == [
        block.writers for block in plain.anatomy.text.blocks
    ]
    assert set(vlm.hook_points) == set(plain.hook_points)
    told = vlm.anatomy.absent.get("float32", "")
    assert told.startswith("it does not run in float32 (only half") == (kind is FloatlessMLP)
    assert ("no float32" in str(vlm)) == (kind is FloatlessMLP)


class DampedFloatless(Damped):
    """Nearly a sum, and not to be seen in float32."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if hidden_states.dtype == torch.float32:
            raise RuntimeError("only half precisions are implemented")
        return super().forward(hidden_states, **kwargs)


def test_in_its_own_precision_only_what_holds_bit_for_bit_is_taken() -> None:
    given = llama(DampedFloatless, torch.bfloat16)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    assert "float32" in vlm.anatomy.absent
    assert not any(block.writers for block in vlm.anatomy.text.blocks)


class Int8(nn.Module):
    """A quantized linear layer: whole numbers and a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            x, self.get_buffer("weight").to(x.dtype) * self.get_buffer("scale").to(x.dtype)
        )


def quantized(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8(layer.mlp.down_proj)
        layer.self_attn.o_proj = Int8(layer.self_attn.o_proj)


def offloaded(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("change", (quantized, offloaded))
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_quantized_and_offloaded_models_open_as_what_they_are(change: Any, dtype: torch.dtype) -> None:
    plain, given = build("llama", dtype=dtype), build("llama", dtype=dtype)
    change(given.model)
    with torch.no_grad():
        bare = given.model(**given.inputs).logits
    vlm, whole = HookedVLM(given.model, inputs=given.inputs), HookedVLM(plain.model, inputs=plain.inputs)
    assert vlm.anatomy == whole.anatomy
    assert set(vlm.hook_points) == set(whole.hook_points)
    with torch.no_grad():
        assert torch.equal(given.model(**given.inputs).logits, bare)
    assert all(weight.is_meta for weight in given.model.parameters()) == (change is offloaded)


def test_in_float32_a_model_computes_what_its_weights_do_in_float32() -> None:
    """The truth is the model converted; it lies a hundred times nearer than the model as it is."""
    given = build("llava", dtype=torch.bfloat16)
    wide = build("llava", dtype=torch.bfloat16).model.float()
    inputs = {name: v.float() if v.is_floating_point() else v for name, v in given.inputs.items()}
    with torch.no_grad():
        truth = wide(**inputs).logits
        own = given.model(**given.inputs).logits
        with in_float32(given.model) as precision:
            seen = given.model(**precision.given(given.inputs)).logits
        assert torch.equal(given.model(**given.inputs).logits, own)
    assert (seen.dtype, own.dtype) == (torch.float32, torch.bfloat16)
    error = (seen - truth).abs().max().item()
    assert error <= 1e-5 * max(1.0, truth.abs().max().item())
    assert (own - truth).abs().max().item() > 100 * error
    assert {weight.dtype for weight in given.model.parameters()} == {torch.bfloat16}
