"""Adapters: what they lack, what they are tied to, what rounding takes, older names; merged is what PEFT computes.

The truth in every case is the forward pass of the model under PEFT's own adapter, as it was before it was saved.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from hooks.refusals import refuse_adapted
from interp.pair import Pair
from interp.pair.adapter import Merged, merge_adapter, read_adapter
from tests.families import TinyVLM, tiny
from tests.hooks.reference import tolerance

FILE = "adapter_model.safetensors"
TEXT = r".*language_model.*(q_proj|down_proj)"


@pytest.fixture(scope="module")
def llava() -> TinyVLM:
    return tiny("llava", 1)


@torch.no_grad()
def adapter(folder: Path, made: TinyVLM, scale: float = 0.1, **settings: Any) -> tuple[Path, Tensor]:
    """A random adapter, saved, and the logits of the model under it."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": TEXT} | settings)
    torch.manual_seed(0)
    with warnings.catch_warnings():  # PEFT's, of what is merged here in spite of them
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(made.model), config).eval()
        for name, parameter in adapted.named_parameters():
            if ".default" in name:
                parameter.normal_(0, scale)
        adapted.save_pretrained(str(folder))
    return folder, logits(adapted.get_base_model(), made)


@torch.no_grad()
def logits(model: Any, made: TinyVLM) -> Tensor:
    return model(**made.inputs()).logits


def merged(folder: Path, made: TinyVLM, **how: Any) -> Merged:
    return merge_adapter(copy.deepcopy(made.model), folder, read_adapter(folder), made.inputs(), **how)


def rewritten(folder: Path, **changed: Any) -> Path:
    """The adapter's config with other values."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return folder


def renamed(folder: Path, names: Mapping[str, str]) -> Path:
    """The adapter with its tensors under other names."""

    def other(name: str) -> str:
        for new, old in names.items():
            name = name.replace(new, old)
        return name

    tensors = load_file(folder / FILE)
    changed = {other(name): tensor for name, tensor in tensors.items()}
    assert not set(changed) & set(tensors)
    save_file(changed, folder / FILE)
    return folder


def assert_merged(folder: Path, made: TinyVLM, wanted: Tensor, **how: Any) -> None:
    """The merged model computes what the adapted one did, which is far from what IN does."""
    found = logits(merged(folder, made, **how).model, made)
    assert (found - wanted).abs().max() <= 10 * tolerance(wanted)
    assert (wanted - logits(made.model, made)).abs().max() > 1000 * tolerance(wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"alpha_pattern": {"q_proj": 20}, "rank_pattern": {"down_proj": 3}},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_what_is_merged_computes_what_the_adapter_does(settings, llava, tmp_path):
    folder, wanted = adapter(tmp_path, llava, **settings)
    assert_merged(folder, llava, wanted)


def test_tensors_that_the_config_names_and_the_file_lacks_are_refused(llava, tmp_path):
    folder, _ = adapter(tmp_path, llava)
    whole = load_file(folder / FILE)
    name = next(key for key in whole if "layers.1.mlp.down_proj.lora_B" in key)
    for tensors, message in (
        (
            {key: value for key, value in whole.items() if key != name},
            r"1 tensors .*layers.1.mlp.down_proj.*ZeRO-3",
        ),
        ({}, r"there is none.*ZeRO-3"),
        (whole | {name: torch.empty(0)}, r"1 tensors are empty .*down_proj.lora_B.*ZeRO-3"),
    ):
        save_file(tensors, folder / FILE)
        with pytest.raises(FrankenlensError, match=message):
            merged(folder, llava)
    folder, _ = adapter(tmp_path, llava, modules_to_save=["lm_head"])
    kept = {key: value for key, value in load_file(folder / FILE).items() if "lm_head" not in key}
    save_file(kept, folder / FILE)
    with pytest.raises(FrankenlensError, match=r"its config names .*lm_head.*which is not in it"):
        merged(folder, llava)


def test_an_update_of_one_of_two_uses_of_a_weight(tmp_path):
    made = tiny("smolvlm", 1)
    folder, wanted = adapter(tmp_path, made, target_modules=["embed_tokens"])
    with pytest.raises(
        FrankenlensError, match=r"embed_tokens, whose weight is tied to lm_head.*Untie them in IN"
    ):
        merged(folder, made)
    made.model.config.tie_word_embeddings = False  # as the message says
    made.model.lm_head.weight = nn.Parameter(made.model.lm_head.weight.detach().clone())
    assert_merged(folder, made, wanted)


def test_rounding_that_takes_much_of_the_update_is_the_users_decision(llava, tmp_path):
    half = TinyVLM("llava", copy.deepcopy(llava.model).bfloat16(), llava.processor)
    folder, _ = adapter(tmp_path, llava, scale=0.01)
    with pytest.raises(FrankenlensError, match=r"in bfloat16, \d+% of the adapter's update.*dtype='float32'"):
        merged(folder, half)
    found = merged(folder, half, accept=["rounding"])
    exact = merged(folder, TinyVLM("llava", copy.deepcopy(half.model).float(), llava.processor))
    lost = updated = 0.0
    weights = dict(exact.model.named_parameters())
    for name, before in half.model.named_parameters():
        update = weights[name].double() - before.double()
        after = dict(found.model.named_parameters())[name]
        lost += (after.double() - weights[name].double()).square().sum().item() if update.any() else 0.0
        updated += update.square().sum().item()
    assert found.lost == pytest.approx((lost / updated) ** 0.5, rel=1e-3) and found.lost > 0.1
    assert exact.lost == 0 and found.model.dtype == torch.bfloat16
    folder, _ = adapter(tmp_path, llava, scale=0.3)
    assert 0 < merged(folder, half).lost < 0.05


NAMES = {
    "llava": {"model.model.language_model.": "model.language_model.model."},
    "qwen2_vl": {"model.model.language_model.": "model.model."},
}
OLD = {
    "llava": r"^language_model\.model\..*\.(q_proj|down_proj)$",
    "qwen2_vl": r"^model\.layers\..*\.(q_proj|down_proj)$",
}


@pytest.mark.parametrize("family", NAMES)
def test_names_from_before_transformers_4_52_are_mapped(family, tmp_path):
    made = tiny(family, 1)
    old = next(iter(NAMES[family].values())).removeprefix("model.")
    pattern = {"language_model.layers.1.self_attn.q_proj": 40}
    folder, wanted = adapter(tmp_path, made, alpha_pattern=pattern)
    renamed(folder, NAMES[family])
    rewritten(folder, target_modules=OLD[family], alpha_pattern={f"{old}layers.1.self_attn.q_proj": 40})
    assert_merged(folder, made, wanted)


def test_an_adapter_of_another_model_is_refused(llava, tmp_path):
    folder, _ = adapter(tmp_path, llava)
    renamed(folder, {"language_model": "tongue_model"})
    with pytest.raises(FrankenlensError, match=r"tongue_model.* has no place in IN \(12 of 12"):
        merged(folder, llava)
    rewritten(folder, target_modules=["query"])
    with pytest.raises(FrankenlensError, match=r"not the adapter of this model; PEFT says: .*query"):
        merged(folder, llava)


def test_what_cannot_be_merged_is_refused(tmp_path):
    made = tiny("qwen2_vl", 1)
    folder, _ = adapter(tmp_path, made, lora_bias=True)  # its output projections have no bias to add to
    with pytest.raises(FrankenlensError, match=r"PEFT cannot merge this adapter: .*lora_bias"):
        merged(folder, made)
    tuned = get_peft_model(
        copy.deepcopy(made.model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    tuned.save_pretrained(str(tmp_path / "tuned"))
    with pytest.raises(FrankenlensError, match=r"PROMPT_TUNING adds tokens.*such as LoRA"):
        merged(tmp_path / "tuned", made)


def test_a_merge_that_makes_another_model_is_refused(llava, tmp_path, monkeypatch):
    folder, _ = adapter(tmp_path, llava)
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda *args, **kwargs: None)
    with pytest.raises(FrankenlensError, match="the merged model is not the adapted one: .*off by"):
        merged(folder, llava)


def test_a_model_under_peft_is_not_opened(llava):
    adapted = get_peft_model(copy.deepcopy(llava.model), LoraConfig(target_modules=TEXT))
    with pytest.raises(FrankenlensError, match=r"a PeftModel holds its adapter beside its weights"):
        refuse_adapted(adapted)
    inside = copy.deepcopy(
        llava.model
    )  # as the arguments' types are checked here, of the class that they ask for
    inside.__class__ = type("PeftModel", (type(inside),), {"__module__": "peft.peft_model"})
    with pytest.raises(FrankenlensError, match=r"merge_and_unload.*adapter's folder as RL"):
        HookedVLM(inside, llava.processor)


def test_a_pair_says_how_much_of_the_update_its_weights_hold(llava, tmp_path):
    half = copy.deepcopy(llava.model).bfloat16()
    half.save_pretrained(tmp_path / "in")
    llava.processor.save_pretrained(tmp_path / "in")
    folder, _ = adapter(tmp_path / "rl", llava, scale=0.01)
    with pytest.raises(FrankenlensError, match="--dtype float32"):
        Pair.from_pretrained(tmp_path / "in", folder, check=False)
    pair = Pair.from_pretrained(tmp_path / "in", folder, check=False, accept=["rounding"])
    (line,) = pair.provenance()["rl"]["accepted"]
    assert "the merged model hold all but" in line
