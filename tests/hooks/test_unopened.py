"""An architecture that is watched in place of a model says of it what watching the model itself says."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hooks import FrankenlensError, HookedVLM, weight_slices
from hooks.anatomy import find_anatomy
from hooks.anatomy.by_names import declared_anatomy
from hooks.anatomy.rebuilt import rebuilt
from hooks.processors import image_token_of
from hooks.unopened import READ_OFF, unopened_anatomy
from hooks.weights import wholes
from interp.comparison import Checkpoint, every_address
from interp.comparison.addresses import owned
from interp.comparison.names import places
from interp.freezing import frozen_rows
from tests.architectures import ARCHITECTURES, build
from tests.families import EACH_KIND, tiny

DEFAULT = ("gemma2", "qwen3_5_text", "gpt2", "jamba", "qwen3_vl_moe", "mllama")
"""Post-norms, mixers, Conv1D with positions of its own, experts, a packed vision tower, cross-attention."""
WORDLESS = ("pi0", "diffusion_gemma")  # their logits are not of the prompt
EVERY = [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
    for name in ARCHITECTURES
    if name not in WORDLESS
]


@pytest.mark.parametrize("name", EVERY)
def test_weights_that_cost_nothing_show_the_same_anatomy(name: str) -> None:
    model, inputs, _ = build(name)
    token = image_token_of(model)
    other = rebuilt(type(model), model.config)
    wanted = find_anatomy(model, inputs, token)
    assert find_anatomy(other, inputs, token) == wanted
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", EVERY)
def test_the_wholes_name_every_weight_once(name: str) -> None:
    model, inputs, _ = build(name)
    anatomy = find_anatomy(model, inputs, image_token_of(model))
    pieces = [one for address in wholes(model, anatomy) for one in weight_slices(model, anatomy, address)]
    assert all(one.dim is None for one in pieces)
    named = [one.parameter for one in pieces]
    every = dict(model.named_parameters(remove_duplicate=False))
    assert len(named) == len(set(named))
    assert {id(every[name]) for name in named} == {id(tensor) for tensor in every.values()}


def test_a_model_of_70b_takes_no_memory() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    model = rebuilt(LlamaForCausalLM, config)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(p.numel() for p in model.parameters()) > 3e9
    assert sum(held.values()) < 4e6
    row = model.model.embed_tokens.weight
    assert torch.equal(row[7, :-1], row[6, 1:]) and row[:100].unique(dim=0).shape[0] == 100


@pytest.mark.parametrize("family", EACH_KIND)
def test_families_that_are_read_off_are_read_as_they_are_seen(family: str) -> None:
    made = tiny(family)
    config, names = made.model.config, [name for name, _ in made.model.named_parameters()]
    types = (config.model_type, config.get_text_config().model_type, config.vision_config.model_type)
    assert types in READ_OFF
    vlm = HookedVLM(made.model, made.processor, inputs=made.inputs())
    read = declared_anatomy(made.model)
    assert places(read, names) == places(vlm.anatomy, names)
    for address in wholes(made.model, vlm.anatomy):
        assert weight_slices(made.model, read, address) == weight_slices(made.model, vlm.anatomy, address)
    for prefix in ("", "vision."):
        for part in ("attn.head.1", "attn.kv_head.1", "mlp.neuron.3", "mlp", "attn"):
            address = f"{prefix}blocks.1.{part}"
            ours, theirs = (weight_slices(made.model, a, address) for a in (read, vlm.anatomy))
            assert ours == theirs


@pytest.mark.parametrize("name", ["gemma2", "qwen3_5_text", "gpt2", "qwen3_moe"])
def test_an_address_is_the_same_weights_in_comparison_grafts_and_freezing(name: str, tmp_path) -> None:
    model = build(name).model
    model.save_pretrained(tmp_path)
    checkpoint, vlm = Checkpoint(tmp_path), HookedVLM(model, check=False)
    own = dict(model.named_parameters(remove_duplicate=False))
    addresses = every_address(checkpoint)
    assert {"embed", "blocks.1", "blocks.1.mlp"} <= set(addresses)
    for place, (address, compared) in enumerate(owned(checkpoint, addresses).items()):
        grafted = weight_slices(model, vlm.anatomy, address)
        shape = [(own[piece.parameter].data_ptr(), piece.dim, piece.start, piece.length) for piece in grafted]
        assert shape == [(own[p.parameter].data_ptr(), p.dim, p.start, p.length) for p in compared]
        if place % 9:
            continue
        frozen = frozen_rows(model, [address])
        assert {own[n].data_ptr() for n in frozen} == {own[p.parameter].data_ptr() for p in grafted}
        assert sum(own[n].numel() if r is None else r.kept.numel() for n, r in frozen.items()) == sum(
            piece.of(own[piece.parameter]).numel() for piece in grafted
        )


def test_what_only_an_image_shows_is_refused_with_the_way_out() -> None:
    model = build("mllama").model
    for opening in (HookedVLM, unopened_anatomy):
        with pytest.raises(FrankenlensError, match="decoder blocks 1, 3 do not run without an image"):
            opening(model)
    other = build("gemma3").model
    with pytest.raises(FrankenlensError, match="no image was there to see it by: give the model's processor"):
        weight_slices(other, unopened_anatomy(other), "vision")
