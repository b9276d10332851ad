"""A head's weights are its own: checked by what they do, not by where they lie."""

import copy

import pytest
import torch

from hooks import FrankenlensError, HookedVLM, graft, weight_slices
from tests.families import FAMILIES, tiny


@pytest.fixture(params=FAMILIES)
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
    _, after = HookedVLM(model, check=False).run_with_cache(inputs, name)
    moved = (after[name] - before[name]).abs().flatten(0, -3).amax((0, 2))
    assert moved[1] > 1e-2
    assert moved[[h for h in range(len(moved)) if h != 1]].max() == 0


@pytest.mark.parametrize("tower", ["", "vision."])
def test_kv_head_weights_change_keys_and_values_of_that_head(opened, tower: str) -> None:
    vlm, inputs = opened
    model = _perturbed(vlm, f"{tower}blocks.1.attn.kv_head.1")
    names = [f"{tower}blocks.1.attn.hook_{letter}" for letter in "qkv"]
    _, before = vlm.run_with_cache(inputs, names)
    _, after = HookedVLM(model, check=False).run_with_cache(inputs, names)
    q, k, v = ((after[name] - before[name]).abs().flatten(0, -3).amax((0, 2)) for name in names)
    assert q.max() == 0
    assert k[1] > 1e-2 and v[1] > 1e-2
    assert k[0] == 0 and v[0] == 0


@pytest.mark.parametrize("tower", ["", "vision."])
def test_neuron_weights_change_that_neuron(opened, tower: str) -> None:
    vlm, inputs = opened
    name = f"{tower}blocks.1.mlp.hook_post"
    _, before = vlm.run_with_cache(inputs, name)
    _, after = HookedVLM(_perturbed(vlm, f"{tower}blocks.1.mlp.neuron.3"), check=False).run_with_cache(
        inputs, name
    )
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
