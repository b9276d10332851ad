"""Loading processors: with the video part left out where torchvision is missing, and one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from hooks.errors import FrankenlensError
from hooks.processors import image_only, load_processor

QWEN = [Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor]
SPECIAL = [
    "<|vision_start|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_end|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "what", "?", *SPECIAL])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def tiny_qwen(processor_class: type[ProcessorMixin]) -> ProcessorMixin:
    images = Qwen2VLImageProcessorPil(patch_size=7, size={"shortest_edge": 3136, "longest_edge": 3136})
    return image_only(processor_class)(images, tiny_tokenizer(), chat_template="{{ messages }}")  # type: ignore[call-arg]


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8))


@pytest.mark.parametrize("processor_class", QWEN)
def test_qwen_processor_saves_and_reloads(
    processor_class: type[ProcessorMixin], tmp_path: Path, image: Image.Image
):
    before = tiny_qwen(processor_class)
    before.save_pretrained(tmp_path)
    after = load_processor(tmp_path, local_files_only=True)
    assert isinstance(after, processor_class)
    text = "<|vision_start|><|image_pad|><|vision_end|> what ?"
    first, second = (p(images=[image], text=[text], return_tensors="pt") for p in (before, after))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("processor_class", QWEN)
def test_image_tokens_are_marked_for_the_rotary_positions(
    processor_class: type[ProcessorMixin], tmp_path: Path, image: Image.Image
):
    tiny_qwen(processor_class).save_pretrained(tmp_path)
    processor = load_processor(tmp_path, local_files_only=True)
    out = processor(
        images=[image], text=["<|vision_start|><|image_pad|><|vision_end|> what ?"], return_tensors="pt"
    )
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")  # type: ignore[attr-defined]
    assert out["mm_token_type_ids"].tolist() == (out["input_ids"] == pad).int().tolist()
    assert out["mm_token_type_ids"].sum() == 16


def test_the_saved_name_is_that_of_the_ordinary_class(tmp_path: Path):
    tiny_qwen(Qwen2_5_VLProcessor).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["processor_class"] == "Qwen2_5_VLProcessor"


@pytest.mark.skipif(is_torchvision_available(), reason="the ordinary processor is used")
@pytest.mark.parametrize("layout", ["video section", "preprocessor_config.json", "no class named"])
def test_checkpoints_saved_where_torchvision_was_present_load(tmp_path: Path, layout: str):
    processor = tiny_qwen(Qwen2_5_VLProcessor)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    if layout == "video section":
        config["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 7}
        path.write_text(json.dumps(config))
    else:  # as written by transformers 4
        path.unlink()
        processor.image_processor.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    if layout == "no class named":
        tokenizer_config = tmp_path / "tokenizer_config.json"
        named = json.loads(tokenizer_config.read_text())
        del named["processor_class"]
        tokenizer_config.write_text(json.dumps(named))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    loaded = load_processor(tmp_path, local_files_only=True)
    assert isinstance(loaded, Qwen2_5_VLProcessor)
    assert loaded.image_processor.patch_size == 7  # type: ignore[attr-defined]


@pytest.mark.skipif(is_torchvision_available(), reason="videos can be read")
def test_videos_are_refused_by_name(tmp_path: Path):
    tiny_qwen(Qwen2_5_VLProcessor).save_pretrained(tmp_path)
    with pytest.raises(FrankenlensError, match="needs torchvision"):
        load_processor(tmp_path)(text=["what ?"], videos=[np.zeros((2, 3, 56, 56), dtype=np.uint8)])


def test_llava_processor_loads(tmp_path: Path, image: Image.Image):
    clip = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        clip,
        tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    out = load_processor(tmp_path)(images=[image], text=["<image> what ?"], return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 28, 28)


def test_idefics3_processor_loads(tmp_path: Path, image: Image.Image):
    images = Idefics3ImageProcessorPil(size={"longest_edge": 28}, max_image_size={"longest_edge": 28})
    Idefics3Processor(images, tiny_tokenizer(), image_seq_len=4).save_pretrained(tmp_path)
    loaded: Any = load_processor(tmp_path)
    out = loaded(images=[[image]], text=["<image> what ?"], return_tensors="pt")
    assert out["pixel_values"].shape[-2:] == (28, 28)


@pytest.mark.parametrize("model_type", ["llava", "blip-2", "vipllava"])
def test_checkpoint_without_a_processor_is_one_clear_error(tmp_path: Path, model_type: str):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(FrankenlensError, match=r"processor.*save_pretrained"):
        load_processor(tmp_path, local_files_only=True)


def test_a_text_only_checkpoint_needs_its_tokenizer_alone(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    vocabulary = load_processor(tmp_path, local_files_only=True).get_vocab()  # type: ignore[union-attr]
    assert tiny_tokenizer().get_vocab().items() <= vocabulary.items()


def test_processor_without_its_image_part_is_one_clear_error(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with pytest.raises(FrankenlensError, match="cannot load the processor"):
        load_processor(tmp_path, local_files_only=True)


def test_missing_folder_is_one_clear_error(tmp_path: Path):
    with pytest.raises(FrankenlensError, match="nowhere"):
        load_processor(tmp_path / "nowhere", local_files_only=True)
