"""A head's weights are its own: checked by what they do, not by where they lie."""

import copy
from typing import Any

import pytest
import torch

from hooks import FrankenlensError, HookedVLM, graft, weight_slices
from hooks.weights import buffer_slices, saved_buffers, wholes
from tests import architectures
from tests.families import EACH_KIND, tiny


@pytest.fixture(params=EACH_KIND)
def opened(request: pytest.FixtureRequest):
    given = tiny(request.param)
    inputs = given.inputs()
    return HookedVLM(given.model, given.processor, inputs=inputs), inputs


def _perturbed(vlm: HookedVLM, address: str):
    """A copy of the model in which exactly the weights of `address` are others."""
    model = copy.deepcopy(vlm.model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for piece in weight_slices(model, vlm.anatomy, address):
            view = piece.of(parameters[piece.parameter])
            view.copy_(
                torch.randn(view.shape, generator=torch.Generator().manual_seed(1))
                * view.std(correction=0).clamp(min=0.1)
            )
    return model


@pytest.mark.parametrize("tower", ["", "vision."])
def test_head_weights_change_that_heads_result_and_no_other(opened, tower: str) -> None:
    vlm, inputs = opened
    model = _perturbed(vlm, f"{tower}blocks.1.attn.head.1")
    name = f"{tower}blocks.1.attn.hook_result"
    _, before = vlm.run_with_cache(inputs, name)
    _, after = HookedVLM(model, inputs=inputs, check=False).run_with_cache(inputs, name)
    moved = (after[name] - before[name]).abs().flatten(0, -3).amax((0, 2))
    assert moved[1] > 1e-2
    assert moved[[h for h in range(len(moved)) if h != 1]].max() == 0


@pytest.mark.parametrize("tower", ["", "vision."])
def test_kv_head_weights_change_keys_and_values_of_that_head(opened, tower: str) -> None:
    vlm, inputs = opened
    model = _perturbed(vlm, f"{tower}blocks.1.attn.kv_head.1")
    names = [f"{tower}blocks.1.attn.hook_{letter}" for letter in "qkv"]
    _, before = vlm.run_with_cache(inputs, names)
    _, after = HookedVLM(model, inputs=inputs, check=False).run_with_cache(inputs, names)
    q, k, v = ((after[name] - before[name]).abs().flatten(0, -3).amax((0, 2)) for name in names)
    assert q.max() == 0
    assert k[1] > 1e-2 and v[1] > 1e-2
    assert k[0] == 0 and v[0] == 0


@pytest.mark.parametrize("tower", ["", "vision."])
def test_neuron_weights_change_that_neuron(opened, tower: str) -> None:
    vlm, inputs = opened
    name = f"{tower}blocks.1.mlp.hook_post"
    _, before = vlm.run_with_cache(inputs, name)
    _, after = HookedVLM(
        _perturbed(vlm, f"{tower}blocks.1.mlp.neuron.3"), inputs=inputs, check=False
    ).run_with_cache(inputs, name)
    moved = (after[name] - before[name]).abs().flatten(0, -2).amax(0)
    assert moved[3] > 1e-3 and moved.sum() == moved[3]


def test_the_addresses_cover_every_parameter_once(opened) -> None:
    vlm, _ = opened
    n_text, n_vision = len(vlm.anatomy.text.blocks), len(vlm.anatomy.vision.blocks)
    whole = ["embed", f"blocks.0-{n_text - 1}", "ln_final", "vision", "projector"]
    named = [piece.parameter for address in whole for piece in weight_slices(vlm.model, vlm.anatomy, address)]
    if vlm.model.get_output_embeddings().weight is vlm.model.get_input_embeddings().weight:
        with pytest.raises(FrankenlensError, match="tied to the embedding"):
            weight_slices(vlm.model, vlm.anatomy, "unembed")
        named.append(f"{vlm.anatomy.unembed}.weight")
    else:
        named += [p.parameter for p in weight_slices(vlm.model, vlm.anatomy, "unembed")]
    assert sorted(named) == sorted(name for name, _ in vlm.model.named_parameters(remove_duplicate=False))
    inner = weight_slices(vlm.model, vlm.anatomy, f"vision.blocks.0-{n_vision - 1}")
    assert {p.parameter for p in inner} < set(named)


def test_graft_of_everything_makes_the_donor(opened) -> None:
    vlm, inputs = opened
    donor = _perturbed(vlm, "blocks.0-2.mlp")
    with torch.no_grad():
        expected = donor(**inputs).logits
        graft(vlm.model, donor, weight_slices(vlm.model, vlm.anatomy, "blocks.0-2"))
        assert torch.equal(vlm(inputs).logits, expected)


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("blocks.99", "blocks 0-2"),
        ("blocks.0.attn.head.9", "heads 0-3"),
        ("blocks.0.attn.kv_head.2", "kv_heads 0-1"),
    ],
)
def test_a_component_the_model_does_not_have(opened, address: str, match: str) -> None:
    vlm, _ = opened
    with pytest.raises(FrankenlensError, match=match):
        weight_slices(vlm.model, vlm.anatomy, address)


class _FusedMLP(torch.nn.Module):
    """Gate and up in one matrix, as Phi-3 has them."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        d_mlp, d_model = mlp.gate_proj.weight.shape
        self.gate_up_proj = torch.nn.Linear(d_model, 2 * d_mlp, bias=False)
        self.gate_up_proj.weight.data = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def test_a_neuron_of_a_fused_mlp_owns_its_gate_and_its_up() -> None:
    bare = tiny("llava")
    layer: Any = bare.model.get_submodule("model.language_model.layers.1")
    layer.mlp = _FusedMLP(layer.mlp)
    vlm = HookedVLM(bare.model, check=False)
    d_mlp = layer.mlp.down_proj.in_features
    slices = weight_slices(vlm.model, vlm.anatomy, "blocks.1.mlp.neuron.3")
    rows = [(s.parameter.split(".")[-2], s.dim, s.start, s.length) for s in slices]
    assert rows == [("gate_up_proj", 0, 3, 1), ("gate_up_proj", 0, d_mlp + 3, 1), ("down_proj", 1, 3, 1)]
    inputs = bare.inputs()
    with torch.no_grad():
        _, before = vlm.run_with_cache(inputs, "blocks.1.mlp.hook_post")
        for piece in slices[:2]:
            piece.of(vlm.model.get_parameter(piece.parameter)).zero_()
        _, after = vlm.run_with_cache(inputs, "blocks.1.mlp.hook_post")
    moved = (after["blocks.1.mlp.hook_post"] - before["blocks.1.mlp.hook_post"]).abs().flatten(0, -2).amax(0)
    assert moved[3] > 1e-3 and moved.sum() == moved[3]


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "t5gemma2",  # two embeddings share one matrix
        pytest.param("diffusion_gemma", marks=pytest.mark.slow),  # as encoder and decoder do all of theirs
        pytest.param("florence2", marks=pytest.mark.slow),  # four vision towers in one module
        pytest.param("blip", marks=pytest.mark.slow),  # an unembedding that is tied but for its bias
        pytest.param("udop", marks=pytest.mark.slow),
        pytest.param("phi4_multimodal", marks=pytest.mark.slow),
        pytest.param("muse_spark", marks=pytest.mark.slow),
    ],
)
def test_wholes_name_every_tensor_once(name: str) -> None:
    given = architectures.build(name)
    model: Any = given.model
    anatomy = HookedVLM(model, inputs=given.inputs, check=False).anatomy
    own = dict(model.named_parameters(remove_duplicate=False))
    named = [
        id(own[piece.parameter])
        for address in wholes(model, anatomy)
        for piece in weight_slices(model, anatomy, address)
    ]
    assert sorted(named) == sorted(id(weight) for weight in model.parameters())
    rest = {*wholes(model, anatomy), "rest"}
    held = [piece.parameter for address in rest for piece in buffer_slices(model, anatomy, address)]
    assert sorted(held) == sorted(saved_buffers(model))


def test_a_graft_between_types_is_exact_or_refused() -> None:
    given = architectures.build("llama")
    model: Any = given.model
    anatomy = HookedVLM(model, inputs=given.inputs, check=False).anatomy
    half, slices = copy.deepcopy(model).to(torch.bfloat16), weight_slices(model, anatomy, "blocks.1.mlp")
    before = {name: value.clone() for name, value in half.named_parameters()}
    with pytest.raises(FrankenlensError, match=r"float32 in the donor and torch.bfloat16 in the recipient"):
        graft(half, model, slices)
    assert all(torch.equal(value, before[name]) for name, value in half.named_parameters())
    graft(model, half, slices)  # float32 holds what bfloat16 does
    own, theirs = (dict(m.named_parameters()) for m in (model, half))
    assert all(torch.equal(own[s.parameter], theirs[s.parameter].float()) for s in slices)
