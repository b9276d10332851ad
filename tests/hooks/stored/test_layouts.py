"""Checkpoints as trainers leave them: equal to the safetensors bit for bit, and none of their pickles is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import embedded
from hooks.errors import FrankenlensError
from hooks.loading import load_model
from hooks.stored.layouts import layout_of
from interp.comparison import Checkpoint, compare
from interp.pair import Pair
from interp.pair.pair import weights_sha256

IN, RL = embedded.path("in"), embedded.path("rl")
WRITER = Path(__file__).with_name("trainers.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded RL, saved by two processes of torch.distributed in every layout."""
    out = tmp_path_factory.mktemp("run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(WRITER)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r), port, str(RL), str(out)], env=env) for r in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    universal(load_file(RL / "model.safetensors"), out / "universal")
    apart(load_file(RL / "model.safetensors"), out / "numbered")
    return out


def universal(state: dict[str, torch.Tensor], folder: Path) -> None:
    """As DeepSpeed's ds_to_universal writes it."""
    for key, tensor in state.items():
        place = folder / "zero" / f"module.{key}"
        place.mkdir(parents=True)
        torch.save({"param": tensor.float(), "cat_dim": 0}, place / "fp32.pt")
        torch.save({"param": torch.zeros_like(tensor)}, place / "exp_avg.pt")


def apart(state: dict[str, torch.Tensor], folder: Path, n: int = 3) -> None:
    """Safetensors in several files, and no index."""
    folder.mkdir()
    for i in range(n):
        some = {key: state[key] for j, key in enumerate(sorted(state)) if j % n == i}
        save_file(some, folder / f"model-{i + 1:05d}-of-{n:05d}.safetensors", metadata={"format": "pt"})


LAYOUTS = ("fsdp2", "fsdp1", "meshes", "dcp", "universal", "numbered")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_safetensors_bit_for_bit(layout: str, run: Path) -> None:
    wanted = load_model(RL)
    found = load_model(run / layout, settings=IN)
    assert weights_sha256(found) == weights_sha256(wanted)
    assert found.dtype == wanted.dtype
    assert found.name_or_path == str(run / layout)
    checkpoint, plain = Checkpoint(run / layout, IN), Checkpoint(RL)
    assert checkpoint.weights_sha256() == plain.weights_sha256()
    assert checkpoint.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(checkpoint.read(name), plain.read(name)) for name in plain.tensors)
    wide = max(
        plain.tensors, key=lambda name: plain.tensors[name].shape[-1] if plain.tensors[name].matrix else 0
    )
    blocks = zip(checkpoint.blocks(wide, 1000), plain.blocks(wide, 1000), strict=True)
    assert all(torch.equal(*pair) for pair in blocks)


def test_an_optimizer_beside_the_model_is_left_alone(run: Path) -> None:
    assert Checkpoint(run / "dcp", IN).ignored == ["optim.state.exp_avg"]


def test_a_step_of_verl_opens_as_rl(run: Path, tmp_path: Path) -> None:
    step = tmp_path / "global_step_20"
    shutil.copytree(run / "fsdp2", step / "actor")
    beside = step / "actor" / "huggingface"
    beside.mkdir()
    for file in RL.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, beside)
    assert layout_of(step).settings == beside
    assert layout_of(step).borrowed == ()
    pair = Pair.from_pretrained(IN, step, check=False)
    assert pair.borrowed == {}
    assert weights_sha256(pair.rl.model) == weights_sha256(load_model(RL))
    pair.close()


def test_settings_are_in_s_where_a_step_has_none_and_that_is_said(run: Path) -> None:
    pair = Pair.from_pretrained(IN, run / "dcp", check=False)
    assert pair.borrowed == {"rl": f"config.json and tokenizer of {IN}"}
    assert pair.provenance()["rl"]["settings"] == f"config.json and tokenizer of {IN}"
    assert weights_sha256(pair.rl.model) == weights_sha256(load_model(RL))
    pair.close()
    with pytest.raises(FrankenlensError, match="no config.json, neither there nor in huggingface/"):
        load_model(run / "dcp")


def test_compare_reads_shards(run: Path) -> None:
    wanted, found = (compare(IN, rl, spectra=False) for rl in (RL, run / "meshes"))
    columns = ["param_name", "fro_norm", "sparsity", "n"]
    assert found[columns].equals(wanted[columns])
    assert (wanted["fro_norm"] > 0).any()


class Attack:
    """What a pickle can hold: a call of anything."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def in_an_index(folder: Path, attack: Attack) -> str:
    index = folder / ".metadata"
    metadata = pickle.loads(index.read_bytes())  # ours
    metadata.planner_data = attack
    index.write_bytes(pickle.dumps(metadata))
    return ".metadata"


def in_a_part(folder: Path, attack: Attack) -> str:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(
        place for key, place in metadata.storage_data.items() if key.fqn.startswith("model.") and key.offset
    )
    stream = io.BytesIO()
    torch.save(attack, stream)
    file = folder / place.relative_path
    place.offset, place.length = file.stat().st_size, len(stream.getvalue())
    with file.open("ab") as end:
        end.write(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return file.name


def in_a_file(folder: Path, attack: Attack) -> str:
    file = next(folder.rglob("*rank_1.pt"), None) or next(folder.rglob("fp32.pt"))
    torch.save({"a": attack}, file)
    return file.name


@pytest.mark.parametrize(
    ("layout", "put"),
    [
        ("dcp", in_an_index),
        ("dcp", in_a_part),
        ("fsdp2", in_a_file),
        ("fsdp1", in_a_file),
        ("universal", in_a_file),
    ],
)
def test_a_pickle_that_calls_code_is_refused(
    layout: str, put: Callable[[Path, Attack], str], run: Path, tmp_path: Path
) -> None:
    folder, mark = tmp_path / "m", tmp_path / "ran"
    shutil.copytree(run / layout, folder)
    file = put(folder, Attack(mark))
    for ask in (lambda: load_model(folder, settings=IN), lambda: Checkpoint(folder, IN)):
        with pytest.raises(FrankenlensError, match=r"(posix|nt)\.system") as told:
            ask()
        assert str(folder) in str(told.value) and file in str(told.value)
        assert not mark.exists()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


CRAFTED = {
    "a call through getattr": opcodes(b"c__builtin__\ngetattr\ncos\nsystem\n\x86R"),
    "a name with a dot in it": opcodes(b"ctorch\nos.system\nX\x04\x00\x00\x00true\x85R"),
    "a module of torch that is no class of tensors": opcodes(b"ctorch.hub\nload\n)R"),
    "a module that only begins like torch": opcodes(b"ctorchvision\nDTensor\n)R"),
    "an extension of copyreg": opcodes(b"\x82\x01"),
    "a place in a file that the pickle makes up": opcodes(
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR"
    ),
    "a memo of a billion": opcodes(b"}r\x00\x00\x00\x7f"),
    "nothing at all": b"",
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_pickle_is_one_clear_error(what: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(run / "fsdp2", folder)
    with zipfile.ZipFile(folder / "model_world_size_2_rank_0.pt", "w") as archive:
        archive.writestr("m/data.pkl", CRAFTED[what])
    with pytest.raises(FrankenlensError, match="rank_0.pt|do not hold|not a state dict"):
        load_model(folder, settings=IN)


def test_what_a_folder_lacks_is_named(run: Path, tmp_path: Path) -> None:
    def copied(layout: str) -> Path:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        return Path(shutil.copytree(run / layout, tmp_path / "m"))

    def refused(folder: Path, words: str) -> None:
        with pytest.raises(FrankenlensError, match=words):
            load_model(folder, settings=IN)

    folder = copied("fsdp2")
    (folder / "model_world_size_2_rank_1.pt").unlink()
    refused(folder, "model_world_size_2_rank_1.pt is missing")
    shutil.copy(folder / "model_world_size_2_rank_0.pt", folder / "model_world_size_4_rank_1.pt")
    refused(folder, "shards of 2 and of 4 processes")
    folder = copied("dcp")
    next(folder.glob("__1_*.distcp")).unlink()
    refused(folder, "__1_0.distcp, which is missing")
    folder = copied("dcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, "outside of its folder")
    folder = copied("numbered")
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "number 2 is missing")
    folder = copied("universal")
    shutil.rmtree(next((folder / "zero").glob("*embed_tokens*")))
    refused(folder, "2 weights of Qwen2_5_VLForConditionalGeneration are not in it.*embed_tokens")
    folder = copied("fsdp2")
    shutil.copy(RL / "model.safetensors", folder)
    refused(folder, "two sets of weights")


def test_names_that_do_not_become_the_model_s_are_refused(tmp_path: Path) -> None:
    state = load_file(RL / "model.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({f"student.{key}": one for key, one in state.items()}, folder / "model_world_size_1_rank_0.pt")
    with pytest.raises(FrankenlensError, match=r"are not in it.*It holds student\."):
        load_model(folder, settings=IN)
    adapter = {f"base_model.model.{key}": one for key, one in state.items()}
    torch.save(adapter, folder / "model_world_size_1_rank_0.pt")
    with pytest.raises(FrankenlensError, match="give the adapter's own folder"):
        load_model(folder, settings=IN)


def test_wrapped_safetensors_open(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RL, tmp_path / "m"))
    state = load_file(folder / "model.safetensors")
    wrapped = {f"module._fsdp_wrapped_module.{key}": one for key, one in state.items()}
    save_file(wrapped, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights_sha256(load_model(folder)) == Checkpoint(RL).weights_sha256()
    assert Checkpoint(folder).weights_sha256() == Checkpoint(RL).weights_sha256()


def test_halves_of_two_saves_are_not_one_checkpoint(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "fsdp2", tmp_path / "m"))
    shutil.copy(folder / "model_world_size_2_rank_0.pt", folder / "model_world_size_2_rank_1.pt")
    with pytest.raises(FrankenlensError, match="rank_1.pt was not written by rank 1"):
        load_model(folder, settings=IN)
    folder = Path(shutil.copytree(run / "fsdp1", tmp_path / "n"))
    shutil.copy(folder / "model_world_size_2_rank_0.pt", folder / "model_world_size_2_rank_1.pt")
    with pytest.raises(FrankenlensError, match="do not make"):  # both halves are the first
        load_model(folder, settings=IN)


def test_settings_of_a_quantized_model_are_not_taken_for_shards(run: Path, tmp_path: Path) -> None:
    lender = Path(shutil.copytree(IN, tmp_path / "in"))
    config = json.loads((lender / "config.json").read_text())
    (lender / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(FrankenlensError, match="quantization_config"):
        load_model(run / "dcp", settings=lender)
