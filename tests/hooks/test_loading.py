"""Checkpoints from disk: text alone, causal classes with vision, no processor, code of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)

import frankenlens as fl
from hooks.loading import auto_class
from tests.architectures import build
from tests.text_pairs import tokenizer

REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def save(name: str, folder: Path) -> Any:
    """A tiny model's checkpoint, with nothing beside it."""
    made = build(name)
    made.model.save_pretrained(folder)
    return made


def same(vlm: fl.HookedVLM, made: Any) -> bool:
    with torch.no_grad():
        return torch.equal(vlm(made.inputs).logits, made.model(**made.inputs).logits)


def test_a_text_only_checkpoint_opens_with_its_tokenizer_alone(tmp_path: Path) -> None:
    made = save("qwen3", tmp_path)
    with pytest.raises(fl.FrankenlensError, match="holds no files of a tokenizer"):
        fl.HookedVLM.from_pretrained(tmp_path)
    vlm = fl.HookedVLM.from_pretrained(tmp_path, processor=None)
    assert vlm.processor is None and same(vlm, made)
    tokenizer().save_pretrained(tmp_path)
    vlm = fl.HookedVLM.from_pretrained(tmp_path)
    assert isinstance(vlm.processor, PreTrainedTokenizerBase)
    assert vlm.processor.get_vocab() == tokenizer().get_vocab()
    assert vlm.image_token_id is None and not vlm.can("vision") and same(vlm, made)


def test_a_model_with_vision_opens_on_tensors_without_a_processor(tmp_path: Path) -> None:
    made = save("phi4_multimodal", tmp_path)  # a causal class, whose get_encoder returns the model
    assert type(made.model).__name__.endswith("ForCausalLM")
    vlm = fl.HookedVLM.from_pretrained(tmp_path, processor=None, inputs=made.inputs)
    assert vlm.can("vision") and same(vlm, made)


@pytest.mark.parametrize(
    ("model_type", "named", "auto"),
    [
        ("qwen2_5_vl", None, AutoModelForImageTextToText),
        ("llama", None, AutoModelForCausalLM),
        ("gemma3", "Gemma3ForConditionalGeneration", AutoModelForImageTextToText),
        ("gemma3_text", "Gemma3ForCausalLM", AutoModelForCausalLM),
        ("phi4_multimodal", "Phi4MultimodalForCausalLM", AutoModelForCausalLM),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", AutoModelForImageTextToText),
    ],
)
def test_the_class_is_the_one_that_has_the_architecture(
    model_type: str, named: str | None, auto: Any
) -> None:
    config = CONFIG_MAPPING[model_type]()
    config.architectures = [named] if named else None
    assert auto_class(config) is auto


def test_code_of_a_checkpoint_runs_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own"
    made = save("llama", folder)
    tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(REMOTE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    maps = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": maps}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(fl.FrankenlensError, match="trust_remote_code"):
        fl.HookedVLM.from_pretrained(folder, processor=None)
    vlm = fl.HookedVLM.from_pretrained(folder, processor=None, trust_remote_code=True)
    assert type(vlm.model).__name__ == "OwnForCausalLM" and same(vlm, made)
    vlm = fl.HookedVLM.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(vlm.processor, PreTrainedTokenizerBase)
    assert vlm.processor.get_vocab() == tokenizer().get_vocab()
