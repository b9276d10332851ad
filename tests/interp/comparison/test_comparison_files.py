"""Checkpoints as files: shards, types, older names, tied weights, every family; and what does not align."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from experiments.commands.compare import CompareConfig, account
from hooks import weight_slices
from hooks.errors import FrankenlensError
from hooks.loading import load_model
from interp.comparison import Checkpoint, align, by_address, compare
from interp.pair.pair import weights_sha256
from interp.regions import thirds
from tests.architectures import build
from tests.families import EACH_KIND, redraw, tiny
from tests.half_pairs import HALVES, half_pair

QUICK: dict[str, Any] = {"spectra": False, "progress": False}


def _save(model, folder: Path, **how) -> Path:
    model.save_pretrained(folder, **how)
    return folder


@pytest.fixture
def pair(tmp_path: Path):
    one = tiny("qwen2_5_vl").model
    other = copy.deepcopy(one)
    redraw(other, 3)
    return _save(one, tmp_path / "in"), _save(other, tmp_path / "rl"), one, other


@pytest.mark.parametrize("family", EACH_KIND)
def test_every_family_is_read_whole_and_every_weight_has_a_place(family: str, tmp_path: Path) -> None:
    model = tiny(family).model
    folder = _save(model, tmp_path / family)
    found = Checkpoint(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    own = dict(loaded.named_parameters())
    assert list(found.tensors) == list(own)
    assert all(torch.equal(found.read(name), parameter) for name, parameter in own.items())
    assert found.weights_sha256() == weights_sha256(loaded)
    table = compare(found, found, **QUICK)
    assert table["n"].sum() == sum(parameter.numel() for parameter in own.values())
    assert {"vision", "projector", "decoder", "embeddings", "norm"} <= set(table["section"])
    assert set(table.loc[table["section"] == "projector", "unified_index"]) == {-1}
    blocks = table.loc[table["section"] == "decoder"]
    assert sorted(blocks["unified_index"].unique()) == list(range(len(found.anatomy.text.blocks)))
    vision = table.loc[table["section"] == "vision", "unified_index"].dropna()
    assert sorted(vision.unique()) == list(range(-len(found.anatomy.vision.blocks) - 1, -1))
    assert (table["fro_norm"] == 0).all() and (table["sparsity"] == 1).all() and table["cosine"].isna().all()


def test_shards_and_single_files_give_the_same_table(pair, tmp_path: Path) -> None:
    in_, rl, one, other = pair
    whole = compare(in_, rl, subspace=4, progress=False)
    sharded = [
        _save(model, tmp_path / name, max_shard_size="20KB") for model, name in ((one, "a"), (other, "b"))
    ]
    assert len(list(sharded[0].glob("*.safetensors"))) > 2
    pd.testing.assert_frame_equal(whole, compare(*sharded, subspace=4, progress=False), check_like=False)


def test_older_names_on_disk_are_renamed_as_transformers_does(pair, tmp_path: Path) -> None:
    in_, _, one, _ = pair
    state = load_file(in_ / "model.safetensors")
    new = all(key.startswith(("model.visual.", "model.language_model.", "lm_head")) for key in state)
    swaps = [("model.language_model.", "model."), ("model.visual.", "visual.")]
    folder = tmp_path / "other"
    shutil.copytree(in_, folder)
    renamed = {}
    for key, tensor in state.items():
        for long, short in swaps:
            long, short = (long, short) if new else (short, long)
            if key.startswith(long):
                key = short + key.removeprefix(long)
                break
        renamed[key] = tensor
    assert set(renamed) != set(state)
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    found = Checkpoint(folder)
    assert list(found.tensors) == [name for name, _ in one.named_parameters()] and not found.ignored
    assert found.weights_sha256() == Checkpoint(in_).weights_sha256()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_to_float64(pair, tmp_path: Path, dtype: torch.dtype) -> None:
    _, _, one, other = pair
    nudged = copy.deepcopy(one)
    with torch.no_grad():
        for p, q in zip(nudged.parameters(), other.parameters(), strict=True):
            p.add_(2e-3 * q)
    folders = [_save(m.to(dtype), tmp_path / str(i)) for i, m in enumerate((one, nudged))]
    table = compare(*folders, progress=False)
    after = dict(nudged.named_parameters())
    for (name, before), row in zip(one.named_parameters(), table.to_dict("records"), strict=True):
        delta = (after[name].double() - before.double()).detach().numpy().reshape(len(before), -1)
        assert row["param_name"] == name
        np.testing.assert_allclose(row["fro_norm"], np.linalg.norm(delta), rtol=1e-5)
        same = before == after[name]
        assert row["sparsity"] == pytest.approx(float(same.double().mean()), abs=1e-12)
        if before.ndim > 1:
            np.testing.assert_allclose(row["spectral_norm"], np.linalg.norm(delta, 2), rtol=1e-5)
    assert 0.05 < (table["sparsity"] * table["n"]).sum() / table["n"].sum() < 0.95


def test_checkpoints_of_different_types_compare_in_the_wider(pair, tmp_path: Path) -> None:
    in_, _, one, _ = pair
    half = _save(copy.deepcopy(one).bfloat16(), tmp_path / "half")
    table = compare(half, in_, **QUICK)
    assert (table["sparsity"] == 1).all() and (table["fro_norm"] > 0).all()
    assert (table["sparsity_type"] == "bfloat16").all()
    large = table[table["n"] > 1000]
    np.testing.assert_allclose(large["fro_norm"], large["rounding_norm"], rtol=0.1)


def test_tied_weights_are_one_tensor_and_untied_two(tmp_path: Path) -> None:
    model = tiny("smolvlm").model
    tied = Checkpoint(_save(model, tmp_path / "tied"))
    (target,) = tied.ties
    assert target == "lm_head.weight" and target not in tied.tensors
    with pytest.raises(FrankenlensError, match="tied to"):
        tied.read(target)
    state = load_file(tied.folder / "model.safetensors")
    source = next(key for key in state if key.endswith("embed_tokens.weight"))

    def stored(name: str, head: torch.Tensor) -> Checkpoint:
        shutil.copytree(tied.folder, tmp_path / name)
        save_file(state | {target: head}, tmp_path / name / "model.safetensors", {"format": "pt"})
        return Checkpoint(tmp_path / name)

    twice = stored("twice", state[source].clone())
    assert align(tied, twice) == list(tied.tensors)
    assert by_address(compare(tied, twice, **QUICK), tied, twice, progress=False)["fro_norm"].max() == 0
    untied = stored("untied", state[source] + 1)
    assert target in untied.tensors and not untied.ties
    with pytest.raises(
        FrankenlensError, match=r"do not align: lm_head.weight: tied to .*embed_tokens.weight and its own"
    ):
        align(tied, untied)


def test_what_does_not_align_is_named_before_anything_is_read(pair, tmp_path: Path) -> None:
    in_ = pair[0]
    with pytest.raises(FrankenlensError, match=r"do not align.*and \d+ more"):
        compare(in_, _save(tiny("qwen2_vl").model, tmp_path / "other"), **QUICK)
    given = tiny("qwen2_5_vl")
    given.model.resize_token_embeddings(given.model.config.text_config.vocab_size + 8, mean_resizing=False)
    with pytest.raises(FrankenlensError, match=r"embed_tokens.weight: \(85, 32\) and \(93, 32\)"):
        compare(in_, _save(given.model, tmp_path / "larger"), **QUICK)


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_damaged_folders_are_refused_with_the_reason(pair, tmp_path: Path) -> None:
    in_ = pair[0]
    with pytest.raises(FrankenlensError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(FrankenlensError, match=r"no config.json"):
        Checkpoint(tmp_path)
    adapter = _copy(in_, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FrankenlensError, match="PEFT adapter"):
        Checkpoint(adapter)
    state = load_file(in_ / "model.safetensors")
    name = next(key for key in state if key.endswith("q_proj.weight"))
    for label, change, match in (
        ("less", {k: v for k, v in state.items() if k != name}, "1 weights of .*q_proj.weight"),
        ("int", state | {name: state[name].to(torch.int8)}, "unquantized"),
        ("shape", state | {name: state[name][:-1].clone()}, "not of one checkpoint"),
    ):
        folder = _copy(in_, tmp_path / label)
        save_file(change, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(FrankenlensError, match=match):
            Checkpoint(folder)
    cut = _copy(in_, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(FrankenlensError, match="cannot be read as safetensors"):
        Checkpoint(cut)
    (cut / "model.safetensors").rename(cut / "pytorch_model.bin")
    with pytest.raises(FrankenlensError, match="only pickle files"):
        Checkpoint(cut)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (cut / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FrankenlensError, match=r"names model-00001-of-00002.safetensors, which is missing"):
        Checkpoint(cut)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_are_named_with_their_checkpoint(pair, value: float) -> None:
    in_, rl, _, other = pair
    with torch.no_grad():
        other.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")[2, 3] = value
    _save(other, rl)
    with pytest.raises(FrankenlensError, match=r"rl: model.language_model.layers.1.mlp.up_proj.weight has"):
        compare(in_, rl, **QUICK)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_updates_whose_squares_leave_float32_have_norms_all_the_same(pair, factor: float) -> None:
    in_, rl, one, other = pair
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        one.get_parameter(name).zero_()
        other.get_parameter(name).mul_(factor)
    _save(one, in_)
    _save(other, rl)
    row = compare(in_, rl, progress=False).set_index("param_name").loc[name]
    wanted = np.linalg.svd(other.get_parameter(name).detach().double().numpy(), compute_uv=False)
    np.testing.assert_allclose(row["fro_norm"], np.linalg.norm(wanted), rtol=1e-5)
    np.testing.assert_allclose(row["spectral_norm"], wanted[0], rtol=1e-5)


def test_blocks_and_samples_are_the_tensor(pair) -> None:
    found = Checkpoint(pair[0])
    for name, stored in found.tensors.items():
        whole = found.read(name).reshape(stored.matrix or (-1, 1))
        tall = whole if whole.shape[0] >= whole.shape[1] else whole.T
        for entries in (1, 100, 1 << 20):
            assert torch.equal(torch.cat([block.clone() for block in found.blocks(name, entries)]), tall)
        if stored.entries >= 24:
            sample = found.sample(name, 3, 8)
            assert torch.equal(sample[:8], whole.flatten()[:8])
            assert torch.equal(sample[-8:], whole.flatten()[-8:])


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "qwen3_vl_moe"])
def test_experts_that_lie_apart_on_disk_are_read_as_the_model_has_them(name: str, tmp_path: Path) -> None:
    model = build(name).model
    apart, together = (
        _save(model, tmp_path / form, save_original_format=form == "apart", max_shard_size="60KB")
        for form in ("apart", "together")
    )
    opened = [Checkpoint(folder) for folder in (apart, together)]
    if name != "qwen3_vl_moe":  # which keeps its experts in one tensor
        assert any(len(stored.pieces) > 1 for stored in opened[0].tensors.values())
    for parameter, value in model.named_parameters():
        if parameter not in opened[0].ties:
            assert torch.equal(opened[0].read(parameter), value)
            for entries in (100, 1 << 20):
                parts = [part.clone() for part in opened[0].parts(parameter, entries)]
                assert torch.equal(torch.cat(parts), value.flatten())
    assert opened[0].weights_sha256() == opened[1].weights_sha256()
    shapes = {one: stored.matrix for one, stored in opened[0].tensors.items() if stored.matrix}
    whole = next(one for one, (rows, columns) in shapes.items() if rows < columns)
    blocks = torch.cat([block.clone() for block in opened[0].blocks(whole, 500)]).T
    assert torch.equal(blocks, opened[0].read(whole).flatten(1))


def _routed(folder: Path, seed: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """A mixture of experts whose balancing biases, which are buffers, are drawn too; and its state dict."""
    model = build("glm4v_moe", seed).model
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return _save(model, folder), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_buffers_that_are_saved_are_compared_and_hashed(tmp_path: Path) -> None:
    (in_, before), (rl, after) = _routed(tmp_path / "in", 1), _routed(tmp_path / "rl", 2)
    found = Checkpoint(in_)
    assert not found.ignored and {*found.tensors, *found.ties} == set(before)
    assert found.weights_sha256() == weights_sha256(load_model(in_))
    table = compare(in_, rl, **QUICK).set_index("param_name")
    (name, *_) = [name for name in before if name.endswith("e_score_correction_bias")]
    assert table.loc[name, "fro_norm"] == pytest.approx((after[name] - before[name]).norm().item(), rel=1e-5)
    assert table.loc[name, "address"] == f"blocks.{name.split('layers.')[1][0]}.mlp"
    rows = by_address(compare(in_, rl, **QUICK), in_, rl, addresses=["blocks.1.mlp"], progress=False)
    inside = [key for key in before if ".layers.1.mlp." in key]
    total = sum((after[key] - before[key]).double().square().sum().item() for key in inside) ** 0.5
    assert rows["fro_norm"].item() == pytest.approx(total, rel=1e-5) and name in inside


def test_counters_of_whole_numbers_are_carried_and_not_compared(tmp_path: Path) -> None:
    folder = _save(build("emu3").model, tmp_path / "in")
    found = Checkpoint(folder)
    assert all(name.endswith("num_batches_tracked") for name in found.counters) and found.counters
    assert not set(found.counters) & set(compare(found, found, **QUICK)["param_name"])
    assert found.weights_sha256() == weights_sha256(load_model(folder))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sparsity_counts_in_the_type_that_weights_are_stored_in(dtype, tmp_path: Path) -> None:
    """One unit in the last place of float16 is no change in bfloat16, all but always."""
    models = [vlm.model for vlm in half_pair(dtype)]
    folders = [_save(model, tmp_path / name) for model, name in zip(models, ("in", "rl"), strict=True)]
    table = compare(*folders, **QUICK)
    own, theirs = (dict(model.named_parameters()) for model in models)
    for _, row in table.iterrows():
        name = str(row["param_name"])
        same = own[name] == theirs[name]
        assert row["sparsity"] == pytest.approx(float(same.double().mean()), abs=1e-12)
        assert row["sparsity_type"] == str(dtype).removeprefix("torch.")
    total = (table["sparsity"] * table["n"]).sum() / table["n"].sum()
    assert total == pytest.approx(0.88, abs=0.02)
    part = by_address(table, *folders, addresses=["blocks.1.mlp.neuron.3"], progress=False).iloc[0]
    pieces = weight_slices(models[0], half_pair(dtype)[0].anatomy, "blocks.1.mlp.neuron.3")
    same = torch.cat([(p.of(own[p.parameter]) == p.of(theirs[p.parameter])).flatten() for p in pieces])
    assert part["sparsity"] == pytest.approx(float(same.double().mean()), abs=1e-12)


def test_stages_in_different_types_are_said(tmp_path: Path) -> None:
    in_, rl = (vlm.model for vlm in half_pair(torch.float16))
    folders = {"in": _save(in_, tmp_path / "in"), "rl": _save(rl.float(), tmp_path / "rl")}
    table = compare(*folders.values(), **QUICK)
    assert (table["sparsity_type"] == "float16").all()
    opened = {name: Checkpoint(folder) for name, folder in folders.items()}
    told = account(CompareConfig(), opened, table, thirds(3)).text
    assert "stored in different types (IN float16, RL float32)" in told
    told = account(CompareConfig(), dict.fromkeys(("in", "rl"), opened["in"]), table, thirds(3)).text
    assert "different types" not in told and "the same in float16" in told
