"""Folders from a stranger: none of their code runs, nothing is read outside of them, every damage is one clear error.

The network is closed, and whoever asks for a socket, or for a "y" on standard input, is found out.
"""

from __future__ import annotations

import builtins
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from hooks import processors
from hooks.errors import FrankenlensError
from hooks.loading import load_model
from hooks.processors import load_processor
from interp.comparison import Checkpoint
from interp.pair.adapter import read_adapter
from interp.pair.pair import _own_tokenizer
from interp.prompts import PromptBuilder
from interp.questions import Example
from tests.families import tiny

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import (
    LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel, LlavaProcessor as OwnProcessor,
    PreTrainedTokenizerFast as OwnTokenizer,
)
from transformers import CLIPImageProcessor as OwnImageProcessor
"""
ATTACK = (
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
)
PLACES = {  # where a checkpoint may say that code of its own is to be run
    "config": ("config.json", {"AutoConfig": "own.OwnConfig"}),
    "model": (
        "config.json",
        {"AutoModelForImageTextToText": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel"},
    ),
    "processor": ("processor_config.json", {"AutoProcessor": "own.OwnProcessor"}),
    "image processor": ("preprocessor_config.json", {"AutoImageProcessor": "own.OwnImageProcessor"}),
    "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "llava"
    made = tiny("llava", 1)
    made.model.save_pretrained(folder, save_original_format=False)
    made.processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked for that nobody may have: sockets, and consent."""
    found: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        found.append("a socket")
        raise OSError("the network is closed")

    def consent(*args: Any) -> str:
        found.append("consent")
        return "y"

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(builtins, "input", consent)
    yield found
    assert found == []


def edited(folder: Path, file: str, **entries: Any) -> None:
    path = folder / file
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**known, **entries}), encoding="utf-8")


def told(ask: Callable[[], Any]) -> str:
    """Nothing where it is answered, else the message; any other error is raised."""
    try:
        ask()
    except FrankenlensError as error:
        return str(error)
    return ""


def everyone(folder: Path) -> list[str]:
    """What all readers of a folder have to say about it."""
    return [
        told(lambda: load_model(folder)),
        told(lambda: load_processor(folder)),
        told(lambda: Checkpoint(folder)),
    ]


@pytest.mark.parametrize("torchvision", [True, False])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("place", [*(pytest.param(one, marks=pytest.mark.slow) for one in PLACES), "all"])
def test_no_code_of_a_checkpoint_runs(
    place: str, known: bool, torchvision: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    mark = tmp_path / "ran"
    shutil.copytree(saved, folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    for name, (file, entries) in PLACES.items():
        if place in (name, "all"):
            before = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
            edited(folder, file, auto_map={**before.get("auto_map", {}), **entries})
            if not known:
                kind = {"config.json": "model_type", "tokenizer_config.json": "tokenizer_class"}
                kind |= {
                    "preprocessor_config.json": "image_processor_type",
                    "processor_config.json": "processor_class",
                }
                edited(folder, file, **{kind[file]: "own_kind"})
    if not torchvision:
        monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    everyone(folder)
    told(lambda: _own_tokenizer(folder))
    assert not mark.exists()


def test_a_template_calls_nothing(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    processor: Any = load_processor(saved)
    example = Example("1", (), "q", "a")
    attack = ATTACK.replace("MARK", str(mark))
    for template in (attack, "{% for", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"):
        builder = PromptBuilder(processor, template=template)
        with pytest.raises(FrankenlensError, match="the chat template cannot be filled in"):
            builder.build(example)
    assert not mark.exists()


def test_weights_are_safetensors_inside_the_folder(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copy(saved / "model.safetensors", tmp_path / "outside.safetensors")
    for place, (target, message) in enumerate(
        {
            "pytorch_model.bin": "only safetensors are read",
            "../outside.safetensors": "outside of its folder",
            str(tmp_path / "outside.safetensors"): "outside of its folder",
            "C:\\outside.safetensors": "outside of its folder",
            "a/../../outside.safetensors": "outside of its folder",
        }.items()
    ):
        folder = tmp_path / str(place)
        shutil.copytree(saved, folder)
        (folder / "model.safetensors").unlink()
        shutil.copy(tmp_path / "pytorch_model.bin", folder)
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, target)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        model, _, checkpoint = everyone(folder)
        assert message in model and message in checkpoint
        (folder / "model.safetensors.index.json").unlink()
        edited(folder, "config.json", transformers_weights=target)
        assert message in told(lambda: load_model(folder))  # noqa: B023


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "eight bytes": lambda whole: whole[:8],
    "half": lambda whole: whole[: len(whole) // 2],
    "one byte short": lambda whole: whole[:-1],
    "no JSON": lambda whole: header(b"[" * 5000) + whole,
    "null": lambda whole: header(b"null"),
    "list": lambda whole: header(b"[]"),
    "huge header": lambda whole: (2**62).to_bytes(8, "little") + whole,
    "wrong offsets": lambda whole: header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999]}}'),
    "another type": lambda whole: header(b'{"a":{"dtype":"F99","shape":[0],"data_offsets":[0,0]}}'),
    "a pickle": lambda whole: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_error(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(DAMAGES[damage](weights.read_bytes()))
    model, _, checkpoint = everyone(folder)
    assert "cannot be read as safetensors" in model and "cannot be read as safetensors" in checkpoint
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(weights, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "cannot be read as safetensors" in told(lambda: read_adapter(adapter))


VALUES = {
    "null": "null",
    "list": "[]",
    "text": '"x"',
    "deep": "[" * 100_000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "cut": '{"model_type": "llava"',
    "empty": "",
    "bytes": "\udcff",
}


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "processor_config.json",
        "generation_config.json",
    ],
)
def test_settings_that_are_no_object_are_one_error(file: str, what: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    (folder / file).write_bytes(VALUES[what].encode("utf-8", "surrogateescape"))
    for message in everyone(folder):
        assert file in message and (
            "not a JSON object" in message or "cannot be read" in message or "deeply" in message
        )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"text_config": None}, "text_config is None, not a JSON object"),
        ({"text_config": []}, r"text_config is \[\], not a JSON object"),
        ({"vision_config": "x"}, "vision_config is 'x', not a JSON object"),
        ({"text_config": {}}, "describes a model of [0-9,]+ numbers, and its files hold"),
        (
            {"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}},
            "num_hidden_layers is 1000000000, more",
        ),
        ({"model_type": ["llava"]}, r"model_type is \['llava'\]"),
        ({"architectures": "x"}, "architectures is 'x'"),
        ({"attn_implementation": "someone/kernel"}, "code from a repository, which is not run"),
    ],
)
def test_a_configuration_of_something_else_is_refused_before_memory_is_spent(
    entries: dict[str, Any], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    edited(folder, "config.json", **entries)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)  # nothing is loaded
    with pytest.raises(FrankenlensError, match=message):
        load_model(folder)


@pytest.mark.parametrize("dtype", ["float99", 7, None, [], "load"])
def test_an_unknown_type_is_no_raw_error(dtype: Any, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    edited(folder, "config.json", dtype=dtype)
    assert all(isinstance(message, str) for message in everyone(folder))
    if dtype == "float99":
        assert "float99" in told(lambda: load_model(folder))


@pytest.mark.parametrize(
    "settings", [None, [], {"megatron_config": {}, "megatron_core": "own"}, {"peft_type": "NONE"}]
)
def test_settings_of_an_adapter(settings: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    message = told(lambda: read_adapter(tmp_path))
    assert ("adapter_config.json" in message) == (
        not isinstance(settings, dict) or "megatron_core" in settings
    )
