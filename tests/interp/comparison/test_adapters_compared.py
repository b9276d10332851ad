"""Adapters by their own matrices, against the update that PEFT's own merge makes of them in float64."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hooks import weight_slices
from hooks.errors import FrankenlensError
from interp.comparison import (
    Adapted,
    Checkpoint,
    adapter_by_address,
    adapter_table,
    by_address,
    compare,
    spectrum,
)
from tests.families import TinyVLM, tiny

FILE = "adapter_model.safetensors"
TEXT = r".*language_model.*(q_proj|k_proj|o_proj|down_proj)"
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"q_proj": 20}, "rank_pattern": {"down_proj": 3}},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "convolution": {"target_modules": ["patch_embedding", "fc1"]},
    "whole": {"modules_to_save": ["lm_head"]},
    "bias": {"lora_bias": True, "target_modules": r".*vision.*q_proj"},
    "all biases": {"bias": "all", "target_modules": r".*vision.*q_proj"},
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyVLM, Checkpoint]:
    made, folder = tiny("llava", 1), tmp_path_factory.mktemp("in")
    made.model.save_pretrained(str(folder))
    return made, Checkpoint(folder)


@torch.no_grad()
def adapter(folder: Path, made: TinyVLM, seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    """A random adapter, saved; and what PEFT's merge in float64 adds to each parameter."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": TEXT} | settings)
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # PEFT's, of biases and of weights that have two uses
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(made.model), config).eval()
        for name, parameter in adapted.named_parameters():
            if ".default" in name or (parameter.requires_grad and name.endswith("bias")):
                parameter.normal_(0, 0.1)
        adapted.save_pretrained(str(folder))
        merged: Any = adapted.double().merge_and_unload()
    before = dict(made.model.named_parameters())
    deltas = {name: p.detach() - before[name].double() for name, p in merged.named_parameters()}
    return {name: delta for name, delta in deltas.items() if delta.any()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_number_is_that_of_the_update_that_peft_merges(name: str, llava, tmp_path: Path) -> None:
    made, in_ = llava
    deltas = adapter(tmp_path, made, **ADAPTERS[name])
    table = adapter_table(in_, tmp_path).set_index("param_name")
    assert set(table.index) == set(deltas) == Adapted(in_, tmp_path).adapter.changed
    for parameter, delta in deltas.items():
        row, matrix = table.loc[parameter], delta.flatten(1) if delta.ndim > 1 else delta[:, None]
        values = torch.linalg.svdvals(matrix).numpy()
        assert row["fro_norm"] == pytest.approx(np.linalg.norm(values), rel=1e-6)
        if row["kind"] == "product":
            assert row["spectral_norm"] == pytest.approx(values[0], rel=1e-6)
            assert row["rank"] == np.linalg.matrix_rank(matrix.numpy(), tol=1e-6 * values[0])
            assert row["stable_rank"] == pytest.approx(spectrum(matrix).stable_rank, rel=1e-5)
    assert ((table["kind"] == "whole").any()) == (name in ("whole", "all biases"))


def test_compared_as_rl_it_is_the_merged_checkpoint(llava, tmp_path: Path) -> None:
    made, in_ = llava
    deltas = adapter(tmp_path / "rl", made, use_rslora=True, modules_to_save=["lm_head"])
    merged = copy.deepcopy(made.model).double()
    with torch.no_grad():
        for name, delta in deltas.items():
            merged.get_parameter(name).add_(delta)
    merged.save_pretrained(str(tmp_path / "merged"))
    quick: dict[str, Any] = {"progress": False, "subspace": 4}
    found, wanted = (compare(in_, tmp_path / one, **quick) for one in ("rl", "merged"))
    assert found["param_name"].tolist() == wanted["param_name"].tolist()
    for column in ("fro_norm", "max_abs", "spectral_norm", "stable_rank", "principal_angle_mean_left"):
        np.testing.assert_allclose(found[column], wanted[column], rtol=2e-4, atol=1e-6)
    low = found.set_index("param_name").loc[[one for one in deltas if "lm_head" not in one]]
    assert set(low["spectrum_method"]) == {"low rank"}
    assert (low["effective_rank"] <= 2 + 1e-9).all()  # of float32 differences it would be more
    heads: Any = by_address(found, in_, tmp_path / "rl", progress=False).set_index("address")["fro_norm"]
    direct: Any = adapter_by_address(in_, tmp_path / "rl").set_index("address")["fro_norm"]
    assert "blocks.1.attn.head.2" in direct.index and "blocks.1.attn.kv_head.0" in direct.index
    np.testing.assert_allclose(direct, heads.loc[direct.index], rtol=1e-4)
    assert not heads.drop(direct.index).any()


def test_a_dora_adapter_is_compared_and_has_no_product(llava, tmp_path: Path) -> None:
    made, in_ = llava
    deltas = adapter(tmp_path, made, use_dora=True)
    found = (
        compare(in_, tmp_path, spectra=False, progress=False).set_index("param_name")["fro_norm"].to_dict()
    )
    assert {name for name, norm in found.items() if norm} == set(deltas)
    for name, delta in deltas.items():
        assert found[name] == pytest.approx(float(delta.norm()), rel=1e-4)
    wide = next(name for name in deltas if "down_proj" in name)
    blocks = torch.cat(list(Adapted(in_, tmp_path).blocks(wide, 64)))
    whole = Adapted(in_, tmp_path).read(wide)
    torch.testing.assert_close(blocks, whole.T if whole.shape[1] > whole.shape[0] else whole)
    with pytest.raises(FrankenlensError, match="adapter of DoRA"):
        adapter_table(in_, tmp_path)


def test_two_adapters_by_component(llava, tmp_path: Path) -> None:
    made, in_ = llava
    one = adapter(tmp_path / "one", made, modules_to_save=["lm_head"])
    two = adapter(tmp_path / "two", made, seed=1, r=3, target_modules=r".*(lm_head|q_proj|up_proj)")
    table = adapter_table(in_, tmp_path / "one", tmp_path / "two").set_index("param_name")
    assert set(table.index) == set(one) | set(two)
    for name, row in table.iterrows():
        a, b = (some.get(str(name)) for some in (one, two))
        if a is None or b is None:
            assert np.isnan(row["cosine"]) and row["scalar_product"] == 0
        else:
            assert row["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-7)
    head = adapter_by_address(in_, tmp_path / "one", tmp_path / "two", ["blocks.1.attn.head.1"]).iloc[0]
    pieces = weight_slices(made.model, in_.anatomy, "blocks.1.attn.head.1")
    product = squares = 0.0
    for piece in pieces:
        a, b = (
            piece.of(some[piece.parameter]) if piece.parameter in some else torch.zeros(())
            for some in (one, two)
        )
        product, squares = product + float((a * b).sum()), squares + float(a.square().sum())
    assert head["scalar_product"] == pytest.approx(product, rel=1e-6, abs=1e-12)
    assert head["fro_norm"] == pytest.approx(squares**0.5, rel=1e-6)
    same = adapter_table(in_, tmp_path / "one", tmp_path / "one")
    np.testing.assert_allclose(same["cosine"], 1)


def test_what_is_no_plain_lora_of_this_model_is_refused(llava, tmp_path: Path) -> None:
    made, in_ = llava

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(FrankenlensError, match=message):
            Adapted(in_, folder)

    adapter(tmp_path, made)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for changed, message in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the weights of IN"),
        ({"use_qalora": True}, "its setting use_qalora is True"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"target_modules": TEXT.replace("k_proj", "v_proj")}, "settings name 3 modules that are not in its"),
        ({"modules_to_save": ["lm_head"]}, "name lm_head .modules_to_save., which is not in its file"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
        refused(tmp_path, message)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    whole = load_file(tmp_path / FILE)
    first = next(key for key in whole if "lora_B" in key)
    save_file({key: value for key, value in whole.items() if key != first}, tmp_path / FILE)
    refused(tmp_path, r"lora_B of .* is not in its file.*ZeRO-3")
    save_file({**whole, first: torch.zeros(5, 2)}, tmp_path / FILE)
    refused(tmp_path, "adapter of another model")
    save_file({key.replace("layers.1", "layers.7"): value for key, value in whole.items()}, tmp_path / FILE)
    refused(tmp_path, r"layers\.7\S*, which Llava\w+ has not")
    get_peft_model(
        copy.deepcopy(made.model), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ).save_pretrained(str(tmp_path / "ia3"))
    refused(tmp_path / "ia3", "type 'IA3'")


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    made = tiny("smolvlm", 1)
    made.model.save_pretrained(str(tmp_path / "in"))
    adapter(tmp_path / "rl", made, target_modules=["embed_tokens"])
    with pytest.raises(FrankenlensError, match="embed_tokens, whose weight is tied to lm_head"):
        Adapted(Checkpoint(tmp_path / "in"), tmp_path / "rl")


def test_weights_that_are_kept_transposed(tmp_path: Path) -> None:
    """GPT-2's linear maps are [in, out], and PEFT turns the product round."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32, n_inner=24)
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(str(tmp_path / "in"))
    in_ = Checkpoint(tmp_path / "in")
    settings: Any = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    made: Any = SimpleNamespace(model=model)
    deltas = adapter(tmp_path / "rl", made, **settings)
    table = adapter_table(in_, tmp_path / "rl").set_index("param_name")["fro_norm"].to_dict()
    assert table == pytest.approx({name: float(delta.norm()) for name, delta in deltas.items()}, rel=1e-6)
    before = dict(model.named_parameters())
    made_of_it = Adapted(in_, tmp_path / "rl")
    for name, delta in deltas.items():
        wanted = (before[name].double() + delta).float()
        torch.testing.assert_close(made_of_it.read(name), wanted, rtol=1e-6, atol=1e-6)
        blocks = torch.cat([block.clone() for block in made_of_it.blocks(name, 40)])
        turned = wanted if wanted.shape[0] >= wanted.shape[1] else wanted.T
        torch.testing.assert_close(blocks, turned, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("lora_magnitude_vector", {"use_dora": True}),
        ("lora_B.bias", {"lora_bias": True, "target_modules": r".*vision.*q_proj"}),
        ("pre_layrnorm.bias", {"bias": "all", "target_modules": r".*vision.*q_proj"}),
        ("base_layer.bias", {"bias": "lora_only", "target_modules": r".*vision.*q_proj"}),
    ],
)
def test_what_the_settings_say_and_the_file_lacks_is_missed(
    part: str, settings: dict[str, Any], llava, tmp_path: Path
) -> None:
    made, in_ = llava
    adapter(tmp_path, made, **settings)
    adapter_table(in_, tmp_path) if part != "lora_magnitude_vector" else Adapted(in_, tmp_path)
    tensors = load_file(tmp_path / FILE)
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(FrankenlensError, match=f"{part.split('.')[-1]}.* not in its file"):
        Adapted(in_, tmp_path)


def test_a_rank_that_is_not_the_settings_is_refused(llava, tmp_path: Path) -> None:
    made, in_ = llava
    adapter(tmp_path, made)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "r": 16}))
    with pytest.raises(FrankenlensError, match="rank 16, and its file 2"):
        Adapted(in_, tmp_path)
