"""Writing and reading the folders of the triple: weights, tokenizer, processor, chat template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.processing_utils import ProcessorMixin

from experiments.triple.model import CHAT_TEMPLATE, build_tokenizer
from hooks.processors import image_only, load_processor
from interp.questions.tasks.scenes import IMAGE_SIZE


def build_processor(tokenizer: PreTrainedTokenizerFast, patch: int) -> ProcessorMixin:
    """A Qwen2.5-VL processor that brings every image to 56x56 pixels, hence 16 tokens.

    It has no video part, so it does not need torchvision; `save` writes what the ordinary class needs.
    """
    pixels = IMAGE_SIZE * IMAGE_SIZE
    images = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=1,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": pixels, "longest_edge": pixels},
    )
    return image_only(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=CHAT_TEMPLATE)  # type: ignore[call-arg]


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Writes a self-contained checkpoint; the folder appears complete or not at all.

    Tokenizer and processor are built anew, so those of all stages are the same, whatever a trainer set in its own.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    model.config.use_cache = True  # trainers switch it off
    configs: list[Any] = [model.config, model.config.get_text_config(), model.config.vision_config]
    for config in configs:
        config.dtype = model.dtype  # as of a model that was loaded: all stages say the same
    model.save_pretrained(temporary)
    vision: Any = model.config.vision_config
    build_processor(build_tokenizer(), vision.patch_size).save_pretrained(temporary)
    path = temporary / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # With torchvision the ordinary class is used, which wants a video part.
    shared = {k: v for k, v in config["image_processor"].items() if k != "image_processor_type"}
    config["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor", **shared}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def load(folder: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, ProcessorMixin]:
    """Model (fp32, eval mode) and processor of a folder that `save` wrote."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    processor: Any = load_processor(folder, local_files_only=True)
    return model.eval(), processor
