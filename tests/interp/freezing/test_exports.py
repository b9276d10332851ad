"""Addresses in the terms of other trainers: what their rules freeze by these names, PEFT's own adapters, the hook."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as post_hooks

from hooks import FrankenlensError, weight_slices
from hooks.unopened import unopened_anatomy
from interp.freezing import frozen_names, target_modules
from tests.families import FAMILIES, tiny

UNITS = ("blocks.1.attn.head.1", "blocks.1.attn.kv_head.0", "blocks.2.mlp.neuron.3-7")
WHOLE = ("blocks.0", "blocks.2.attn", "vision")


def owned(model: Any, addresses: Any) -> set[str]:
    return {one.parameter for a in addresses for one in weight_slices(model, unopened_anatomy(model), a)}


def given(model: Any, *addresses: str) -> dict[str, Any]:
    return {one.trainer: one for one in frozen_names(model, addresses).settings}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_finds_these_parameters_and_no_others(family: str) -> None:
    model = tiny(family).model
    found = frozen_names(model, WHOLE)
    for match in (re.search, re.fullmatch):
        assert {n for n, _ in model.named_parameters() if match(found.pattern, n)} == owned(model, WHOLE)
    assert set(found.names) == owned(model, WHOLE) and not found.parts


def test_what_each_trainer_can_say() -> None:
    model = tiny("qwen2_5_vl").model
    visual = given(model, "vision", "projector")
    assert visual["verl"].given == {"actor_rollout_ref.actor.freeze_vision_tower": "True"}
    assert visual["EasyR1"].given == {"worker.actor.model.freeze_vision_tower": "true"}
    assert visual["OpenRLHF"].given == {"--actor.freeze_visual_encoder": ""}
    layers = given(model, "blocks.0-1", "embed", "unembed", "ln_final", "vision", "projector")
    assert layers["LLaMA-Factory"].given == {"finetuning_type": "freeze", "freeze_trainable_layers": "1"}
    for name in ("verl", "EasyR1", "OpenRLHF"):
        assert not layers[name].given and "use freeze_hook.py" in layers[name].note
    tower = given(model, "vision")
    assert not tower["verl"].given and not tower["EasyR1"].given  # theirs takes the projector along
    assert tower["LLaMA-Factory"].given == {
        "finetuning_type": "full",
        "freeze_vision_tower": "true",
        "freeze_multi_modal_projector": "false",
    }
    swift = layers["ms-swift"].given
    wanted = owned(model, ["blocks.0-1", "embed", "unembed", "ln_final", "vision", "projector"])
    frozen = {n for n, _ in model.named_parameters() if re.search(swift["--freeze_parameters_regex"], n)}
    assert frozen == wanted and swift["--freeze_vit"] == "false"
    heads = given(model, "blocks.1.attn.head.1")
    assert not any(one.given for one in heads.values())
    assert all("masks.safetensors" in one.note for one in heads.values())
    llava = given(tiny("llava").model, "vision", "projector")
    assert not llava["verl"].given and llava["OpenRLHF"].given  # verl looks for `visual` alone


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapts_exactly_these_modules(family: str) -> None:
    model: Any = tiny(family).model
    addresses = ["blocks.0-1.mlp", "blocks.2.attn", "vision.blocks.1.attn", "projector"]
    wanted = {
        name.rpartition(".")[0]
        for name in owned(model, addresses)
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
    }
    pattern = target_modules(model, addresses)
    names = list(frozen_names(model, addresses).targets)
    for targets in (names, pattern):  # PEFT puts its layers into the model itself
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        inside = adapted.get_base_model().named_modules()
        assert {name for name, module in inside if isinstance(module, LoraLayer)} == wanted
        model = adapted.unload()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("blocks.1.attn.head.1", r"head\.1 is rows 8-15 of \S*q_proj\.weight, and an adapter acts on all"),
        ("blocks.1.mlp.neuron.3", "name the whole part"),
        ("ln_final", "ln_final has no linear map"),
        ("blocks.9", "the text tower has blocks 0-2"),
    ],
)
def test_what_an_adapter_cannot_be_kept_to_is_refused(address: str, message: str) -> None:
    with pytest.raises(FrankenlensError, match=message):
        target_modules(tiny("qwen2_5_vl").model, address)
    with pytest.raises(
        FrankenlensError, match="nothing is left to train" if address == "x" else "at least one"
    ):
        frozen_names(tiny("qwen2_5_vl").model, [])


def loaded(folder: Path) -> Any:
    """What `patterns` wrote, as a trainer imports it."""
    spec: Any = importlib.util.spec_from_file_location("freeze_hook", folder / "freeze_hook.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


def test_the_hook_takes_gradients_from_where_the_model_was_moved(tmp_path: Path) -> None:
    """A trainer moves the model to its GPU after the call; a device without numbers stands for that here."""
    model = tiny("qwen2_5_vl").model
    found = frozen_names(model, UNITS)
    found.save(tmp_path)
    loaded(tmp_path).freeze(model).remove()
    for name in found.parts:
        parameter = model.get_parameter(name)
        ((_, hook),) = parameter._backward_hooks.items()  # type: ignore[union-attr]
        assert hook(torch.empty_like(parameter, device="meta")).device.type == "meta"


def test_masks_of_an_earlier_run_are_not_taken(tmp_path: Path) -> None:
    model = tiny("qwen2_5_vl").model
    frozen_names(model, UNITS).save(tmp_path)
    found = frozen_names(model, WHOLE)
    found.save(tmp_path)  # whole tensors alone: the masks of the first stay
    assert not found.parts and (tmp_path / "masks.safetensors").exists()
    loaded(tmp_path).freeze(model).remove()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(found.names)
    assert not any(p._backward_hooks for p in model.parameters())
    wrapped = torch.nn.ModuleDict({"module": tiny("qwen2_5_vl").model})
    with pytest.raises(ValueError, match="is no parameter of this ModuleDict.*before the model is wrapped"):
        loaded(tmp_path).freeze(wrapped)
    assert all(p.requires_grad for p in wrapped.parameters())


def test_the_hook_keeps_every_bit_of_what_is_named(tmp_path: Path) -> None:
    made = tiny("qwen2_5_vl")
    model, inputs = made.model, made.inputs(batch=2)
    found = frozen_names(model, [*UNITS, *WHOLE])
    found.save(tmp_path)
    masks, about = (
        load_file(tmp_path / "masks.safetensors"),
        json.loads((tmp_path / "frozen.json").read_text()),
    )
    assert set(masks) == set(about["parts"]) == set(found.parts)
    assert about["regex"] == found.pattern and len(about["trainers"]) == 5
    hook = loaded(tmp_path)
    frozen = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    for address in (*UNITS, *WHOLE):
        for piece in weight_slices(model, unopened_anatomy(model), address):
            piece.of(frozen[piece.parameter]).fill_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    handle = hook.freeze(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.3
    )
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    assert not post_hooks
    for name, p in model.named_parameters():
        assert torch.equal(p[frozen[name]], before[name][frozen[name]]), name
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert set(found.parts) <= set(moved)


def test_a_model_without_weights_will_do() -> None:
    model = tiny("qwen2_5_vl").model
    with torch.device("meta"):
        empty: Any = type(model)(model.config)
    addresses = ["blocks.0", "blocks.1.attn.head.1"]
    a, b = (frozen_names(one, addresses).data() for one in (model, empty))
    assert a == b
