"""What holds a checkpoint is one thing for the model, the comparison and the merge: what one refuses, all refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from hooks.loading import load_model
from hooks.stored.inventory import Inventory
from interp.comparison import Checkpoint, align
from interp.pair import Pair
from tests.families import tiny

READERS: tuple[Callable[[Path], Any], ...] = (load_model, Checkpoint)
QUERY = "model.language_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "llava"
    made = tiny("llava", 1)
    made.model.save_pretrained(folder, save_original_format=False)
    made.processor.save_pretrained(folder)
    return folder


def changed(
    source: Path,
    target: Path,
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A copy with some tensors, and some settings at the top of config.json, replaced."""
    shutil.copytree(source, target)
    if tensors:
        state = load_file(source / "model.safetensors")
        assert set(tensors) <= set(state) | {f"{QUERY}_scale_inv"}
        save_file(state | dict(tensors), target / "model.safetensors", {"format": "pt"})
    if config:
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(config)))
    return target


def refused(folder: Path, message: str) -> None:
    for read in READERS:
        with pytest.raises(FrankenlensError, match=message):
            read(folder)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_quantized_tensors_without_a_word_of_how_are_refused(saved: Path, tmp_path: Path, kind: Any) -> None:
    weight = load_file(saved / "model.safetensors")[QUERY]
    tensors = {QUERY: weight.to(kind), f"{QUERY}_scale_inv": torch.ones(1)}
    refused(changed(saved, tmp_path / "rl", tensors), rf"{QUERY} is .*without their scales.*config.json")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "own"])
def test_a_word_of_quantization_that_is_left_over_is_refused(
    saved: Path, tmp_path: Path, method: str
) -> None:
    folder = changed(saved, tmp_path / "rl", config={"quantization_config": {"quant_method": method}})
    refused(folder, rf"quantization_config \({method}\), but no tensor is quantized .*F32.*delete that entry")
    null = changed(saved, tmp_path / "null", config={"quantization_config": None})
    assert align(Checkpoint(saved), Checkpoint(null))
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_model(saved).parameters(), load_model(null).parameters(), strict=True)
    )


def test_a_vocabulary_that_was_resized_after_the_config_was_written(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    names = [name for name in state if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    larger = {name: torch.cat([state[name], state[name][:5]]) for name in names}
    folder = changed(saved, tmp_path / "rl", larger)
    refused(folder, r"is \[90, 32\] in the file but \[85, 32\] by config.json.*set vocab_size to 90")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 90
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).get_input_embeddings().weight.shape[0] == 90  # type: ignore[union-attr]


def test_two_sets_of_weights_in_one_folder_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path / "rl")
    tiny("llava", 2).model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, folder)
    refused(folder, r"holds two sets of weights, model.safetensors and the \d shards")
    (folder / "model.safetensors").unlink()
    loaded, found = load_model(folder), Checkpoint(folder)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in loaded.state_dict().items())


def test_an_index_of_the_one_file_is_one_set(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path / "rl")
    names = load_file(saved / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_model(folder) is not None and align(Checkpoint(folder), Checkpoint(saved))


def test_an_adapter_is_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path / "rl")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, r"is a PEFT adapter, not a checkpoint.*--rl")


def test_weights_that_are_no_numbers_are_named(saved: Path, tmp_path: Path) -> None:
    broken = load_file(saved / "model.safetensors")[QUERY] * float("nan")
    folder = changed(saved, tmp_path / "rl", {QUERY: broken})
    for check in (True, False):
        with pytest.raises(FrankenlensError, match=rf"1 weights hold NaN or infinity.*{QUERY}.*earlier one"):
            HookedVLM.from_pretrained(folder, check=check)


def test_what_a_pair_refuses_a_comparison_refuses_and_the_reverse(tmp_path: Path) -> None:
    made = tiny("smolvlm", 1)
    for name in ("in", "rl"):
        made.model.save_pretrained(tmp_path / name)
        made.processor.save_pretrained(tmp_path / name)
    state = load_file(tmp_path / "rl" / "model.safetensors")
    source = next(name for name in state if name.endswith("embed_tokens.weight"))
    folders = tmp_path / "in", tmp_path / "rl"
    for head, differ in ((state[source].clone(), False), (state[source] + 1, True)):
        save_file(state | {"lm_head.weight": head}, folders[1] / "model.safetensors", {"format": "pt"})
        on_disk = [one.inventory for one in map(Checkpoint, folders)]
        in_memory = [Inventory.of(load_model(folder)) for folder in folders]
        assert [one.ties for one in on_disk] == [one.ties for one in in_memory]
        assert [one.shapes for one in on_disk] == [one.shapes for one in in_memory]
        for one, two in (on_disk, in_memory):
            assert [unlike.name for unlike in one.unlike(two)] == ["lm_head.weight"] * differ
    message = r"lm_head.weight: tied to .*embed_tokens.weight and its own"
    with pytest.raises(FrankenlensError, match=message):
        align(*map(Checkpoint, folders))
    with pytest.raises(FrankenlensError, match=message):
        Pair.from_pretrained(*folders, check=False)
