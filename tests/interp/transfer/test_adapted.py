"""An adapter written into a whole checkpoint, against PEFT's own merge, reopened by transformers."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import interp.transfer.adapted as adapted_module
from hooks.errors import FrankenlensError
from interp.pair.pair import Pair
from interp.transfer import save_adapted
from tests.architectures import build
from tests.families import TinyVLM, tiny
from tests.hooks.reference import tolerance

TEXT = r".*language_model.*(q_proj|down_proj)"
ADAPTERS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "rank_pattern": {"down_proj": 3}},
    "dora": {"use_dora": True},
    "whole": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
}


def saved(made: TinyVLM, folder: Path, **how: Any) -> Path:
    made.model.save_pretrained(str(folder), **how)
    made.processor.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def adapter(folder: Path, made: TinyVLM, scale: float = 0.1, **settings: Any) -> Any:
    """A random adapter, saved, and the model that PEFT itself merges."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": TEXT} | settings)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(made.model), config).eval()
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.normal_(0, scale)
        model.save_pretrained(str(folder))
        return model.merge_and_unload()


@torch.no_grad()
def logits(model: Any, made: TinyVLM) -> Tensor:
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in made.inputs().items()
    }
    return model(**inputs).logits.float()


@pytest.mark.parametrize("name", ADAPTERS)
def test_reopened_it_computes_what_peft_merges(name: str, tmp_path: Path) -> None:
    made = tiny("llava", 1)
    in_ = saved(made, tmp_path / "in", max_shard_size="40KB")
    wanted = adapter(tmp_path / "rl", made, **ADAPTERS[name])
    report = save_adapted(in_, tmp_path / "rl", tmp_path / "out", progress=False)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    truth = logits(wanted, made)
    assert (logits(found, made) - truth).abs().max() <= tolerance(truth)
    assert (logits(made.model, made) - truth).abs().max() > 1000 * tolerance(truth)
    for own, theirs in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)
    assert report.off is not None and report.moved is not None and report.off < 1e-4 < report.moved
    before, after = ({path.name for path in folder.iterdir()} for folder in (in_, tmp_path / "out"))
    assert {name for name in after - before if not name.startswith(".")} == {"merge.json"} and before <= after
    assert sum(path.suffix == ".safetensors" for path in (tmp_path / "out").iterdir()) > 2
    AutoProcessor.from_pretrained(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == json.loads((in_ / "model.safetensors.index.json").read_text())


def test_types_are_kept_and_what_is_untouched_is_the_same_bytes(tmp_path: Path) -> None:
    made = tiny("qwen2_5_vl", 1)
    made.model.to(torch.bfloat16)
    in_ = saved(made, tmp_path / "in")
    adapter(tmp_path / "rl", made, scale=1.0)
    save_adapted(in_, tmp_path / "rl", tmp_path / "out", progress=False)
    with (
        safe_open(in_ / "model.safetensors", "pt") as a,
        safe_open(tmp_path / "out/model.safetensors", "pt") as b,
    ):
        assert a.metadata() == b.metadata() and set(a.keys()) == set(b.keys())
        for key in a.keys():  # noqa: SIM118
            one, two = a.get_tensor(key), b.get_tensor(key)
            assert two.dtype == torch.bfloat16
            touched = "visual" not in key and ("q_proj.weight" in key or "down_proj" in key)
            assert torch.equal(one, two) != touched, key


def test_an_update_that_the_type_does_not_hold_is_refused_and_float32_holds_it(tmp_path: Path) -> None:
    made = tiny("qwen2_5_vl", 1)
    made.model.to(torch.bfloat16)
    in_ = saved(made, tmp_path / "in")
    adapter(tmp_path / "rl", made, scale=0.01)
    out = tmp_path / "out"
    with pytest.raises(
        FrankenlensError, match=r"in bfloat16, \d+% of the adapter's update .*--dtype float32"
    ):
        save_adapted(in_, tmp_path / "rl", out, progress=False)
    assert not out.exists() or not [path for path in out.iterdir() if not path.name.startswith(".")]
    report = save_adapted(in_, tmp_path / "rl", out, dtype="float32", progress=False)
    assert report.lost < 1e-3
    found = AutoModelForImageTextToText.from_pretrained(out)
    assert found.dtype == torch.float32
    wide = AutoModelForImageTextToText.from_pretrained(in_, dtype=torch.float32)
    truth = logits(PeftModel.from_pretrained(wide, str(tmp_path / "rl")), made)
    assert (logits(found, made) - truth).abs().max() <= tolerance(truth)
    taken = save_adapted(in_, tmp_path / "rl", tmp_path / "lossy", accept=["rounding"], progress=False)
    assert taken.lost > 0.05


def test_it_opens_as_rl_of_a_pair(tmp_path: Path) -> None:
    made = tiny("llava", 1)
    in_ = saved(made, tmp_path / "in")
    adapter(tmp_path / "rl", made)
    save_adapted(in_, tmp_path / "rl", tmp_path / "out", prove=False, progress=False)
    whole, thin = (Pair.from_pretrained(in_, tmp_path / one) for one in ("out", "rl"))
    for one, two in zip(whole.rl.model.parameters(), thin.rl.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    for pair in (whole, thin):
        pair.close()


def test_nothing_is_overwritten_and_nothing_wrong_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny("llava", 1)
    in_ = saved(made, tmp_path / "in")
    adapter(tmp_path / "rl", made)
    with pytest.raises(FrankenlensError, match="is not empty"):
        save_adapted(in_, tmp_path / "rl", in_, progress=False)
    monkeypatch.setattr(
        adapted_module._Writing, "_count", lambda self, before, exact, rounded: rounded.zero_()
    )
    out = tmp_path / "out"
    with pytest.raises(FrankenlensError, match="not the adapted model: on a prompt, its logits are off by"):
        save_adapted(in_, tmp_path / "rl", out, progress=False)
    assert not out.exists() or not [path for path in out.iterdir() if not path.name.startswith(".")]


def test_experts_that_lie_apart_on_disk_are_merged_where_the_adapter_holds_them_whole(tmp_path: Path) -> None:
    """PEFT saves `modules_to_save` as the model has them: all experts in one tensor."""
    made: Any = build("qwen3_moe")
    made.model.save_pretrained(str(tmp_path / "in"))
    wanted = adapter(
        tmp_path / "rl", made, target_modules=["q_proj"], modules_to_save=["experts"]
    ).state_dict()
    report = save_adapted(tmp_path / "in", tmp_path / "rl", tmp_path / "out", progress=False)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert any(".experts.0.gate_proj" in key for key in file.keys())  # noqa: SIM118
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = 0
    for name, own in made.model.state_dict().items():
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(found[name], own)
    assert moved == report.changed and report.off is not None and report.off < 1e-4
