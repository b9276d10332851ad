"""Going on from a trainer's last complete checkpoint, with its weights."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from experiments.frame import is_first_process

_NAME = re.compile(r"checkpoint-(\d+)")


def train_from_last(trainer: Any, folder: Path) -> None:
    """`trainer.train()`, from the last complete checkpoint in `folder` where there is one.

    A run that was killed while it saved leaves a checkpoint that lacks files, or has them cut short; then the one
    before is taken, or training starts from the beginning, and a line on standard error says so.

    The trainer alone brings back optimizer, schedule and random state, but for Qwen2.5-VL and others whose checkpoints
    name tensors differently than their modules it goes on with the weights it was given, and only warns of missing keys
    (https://github.com/huggingface/transformers/issues/43701). So the weights are loaded here first, strictly.
    """
    last = last_complete(folder, trainer.args)
    if last is not None and any(last.glob("*.safetensors")):  # DeepSpeed and FSDP may keep their own files
        saved = type(trainer.model).from_pretrained(last, dtype="auto", local_files_only=True)
        trainer.model.load_state_dict(saved.state_dict())
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def last_complete(folder: Path, args: Any) -> Path | None:
    """The newest checkpoint of a transformers `Trainer` that can be gone on from; None where there is none.

    Args:
        folder: the trainer's output folder.
        args: the trainer's `TrainingArguments`, which say what a checkpoint holds.
    """
    numbered = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))}
    passed: list[str] = []
    found = None
    for step, path in sorted(numbered.items(), reverse=True):
        fault = next(_faults(path, step, args), None)
        if fault is None:
            found = path
            break
        passed.append(f"{path.name} is incomplete ({fault})")
    if passed and is_first_process():
        then = f"going on from {found.name}" if found else "no other is complete, so training starts afresh"
        print(f"{folder}: {'; '.join(passed)}; {then}.", file=sys.stderr)
    return found


def _faults(checkpoint: Path, step: int, args: Any) -> Iterator[str]:
    """What a checkpoint lacks. The trainer itself passes over most of it without a word."""
    yield from _of_state(checkpoint / "trainer_state.json", step)
    sharded = bool(getattr(args, "deepspeed", None) or getattr(args, "fsdp", None))
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights and not sharded:
        yield "no weights"
    for index in checkpoint.glob("*.safetensors.index.json"):
        named = _json(index)
        if named is None:
            yield f"{index.name} is cut short"
            continue
        absent = {*named["weight_map"].values()} - {file.name for file in weights}
        yield from (f"{name} is missing" for name in sorted(absent))
    yield from (f"{file.name} is cut short" for file in weights if not _opens(file))
    wanted = [] if args.save_only_model or sharded else ["optimizer.pt", "scheduler.pt", "rng_state*.pth"]
    yield from (f"{name} is missing" for name in wanted if not any(checkpoint.glob(name)))
    saved = [file for kind in ("*.pt", "*.pth") for file in sorted(checkpoint.glob(kind))]
    yield from (f"{file.name} is cut short" for file in saved if not zipfile.is_zipfile(file))


def _of_state(file: Path, step: int) -> Iterator[str]:
    """Of the file that is written last."""
    if not file.is_file():
        yield f"{file.name} is missing"
    elif (state := _json(file)) is None:
        yield f"{file.name} is cut short"
    elif state.get("global_step") != step:
        yield f"{file.name} is of step {state.get('global_step')}"


def _json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    return found if isinstance(found, dict) else None


def _opens(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
