"""`frankenlens merge` and `frankenlens patterns` on the embedded IN, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from experiments import embedded, planning
from experiments.cli import main
from experiments.making.merge import COMMAND
from hooks.processors import load_processor

IN = embedded.path("in")
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(IN)
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(str(folder))
    return folder


def test_a_merged_adapter_is_a_checkpoint_and_is_never_written_over(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    given = ["merge", str(IN), str(adapter), "--out", str(out)]
    assert main(given) == 0
    assert "lost to rounding; logits on a prompt off by" in capsys.readouterr().out
    base = AutoModelForImageTextToText.from_pretrained(IN, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()  # type: ignore[operator]
    own = AutoModelForImageTextToText.from_pretrained(out)
    shipped = AutoModelForImageTextToText.from_pretrained(IN)
    for one, exact, old in zip(own.parameters(), merged.parameters(), shipped.parameters(), strict=True):
        assert one.dtype == old.dtype
        torch.testing.assert_close(one, exact.to(one.dtype), rtol=2**-7, atol=1e-6)
    assert type(load_processor(out)) is type(load_processor(IN))
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert main(given) == 2 and "is not empty" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_merge_is_planned_as_it_is_computed(adapter: Path, tmp_path: Path) -> None:
    args = [str(IN), str(adapter), "--out", str(tmp_path / "x"), "--rate", "1TFLOP/s"]
    made = planning.plan("merge", COMMAND, args)
    tensors = load_file(adapter / "adapter_model.safetensors")
    pairs = [(tensors[n.replace("lora_B", "lora_A")], b) for n, b in tensors.items() if "lora_B" in n]
    assert made.flops == sum(b.shape[0] * a.shape[1] * (2 * a.shape[0] + 1) for a, b in pairs)


def test_patterns_are_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "whole"
    assert main(["patterns", "vision", "projector", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "verl: actor_rollout_ref.actor.freeze_vision_tower=True (" in told
    assert "EasyR1: worker.actor.model.freeze_vision_tower=true (" in told
    assert "OpenRLHF: --actor.freeze_visual_encoder (" in told and "--freeze_parameters_regex '^" in told
    assert {path.name for path in out.iterdir() if path.is_file() and path.name[0] != "."} == {
        "frozen.json",
        "freeze_hook.py",
    }
    out = tmp_path / "parts"
    assert main(["patterns", "blocks.3.attn.head.1", "--in", str(IN), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.count("no setting freezes") == 0 and told.count("no setting;") == 5
    masks = load_file(out / "masks.safetensors")
    about = json.loads((out / "frozen.json").read_text())
    assert set(masks) == set(about["parts"]) and not about["names"] and about["peft"]["why_not"]
    assert main(["patterns", "layers.3"]) == 2
    assert "is not an address" in capsys.readouterr().err
