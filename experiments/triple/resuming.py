"""Going on from a trainer's last checkpoint, with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint


def train_from_last(trainer: Any, folder: Path) -> None:
    """`trainer.train()`, from the last checkpoint in `folder` where there is one.

    The trainer alone brings back optimizer, schedule and random state, but for Qwen2.5-VL and others whose checkpoints
    name tensors differently than their modules it goes on with the weights it was given, and only warns of missing keys
    (https://github.com/huggingface/transformers/issues/43701). So the weights are loaded here first, strictly.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None and any(
        Path(last).glob("*.safetensors")
    ):  # DeepSpeed and FSDP may keep their own files
        saved = type(trainer.model).from_pretrained(last, dtype="auto", local_files_only=True)
        trainer.model.load_state_dict(saved.state_dict())
    trainer.train(resume_from_checkpoint=last)
