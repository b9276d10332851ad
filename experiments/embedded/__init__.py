"""The triple that ships with the package: Base, IN and RL of a tiny Qwen2.5-VL, and how well each does."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from hooks.errors import FrankenlensError

Stage = Literal["base", "in", "rl"]
STAGES: tuple[Stage, ...] = ("base", "in", "rl")
REASONING_DELIMITERS = ("<think>", "</think>")
"""What stands before and after the chain of thought in a reply."""
ANSWER_DELIMITERS = ("answer", None)
"""What stands before the answer; it runs to the end of the turn."""


def path(stage: Stage) -> Path:
    """The folder of a stage: safetensors weights, tokenizer, processor and chat template.

    Raises:
        FrankenlensError: if the stage is unknown.
        FrankenlensError: if the package was installed without its data.
    """
    if stage not in STAGES:
        raise FrankenlensError(f"there is no stage {stage!r}, only {', '.join(STAGES)}")
    return _data(stage)


def results() -> dict[str, Any]:
    """What `experiments.triple.evaluate` measured of the shipped weights, other seeds and the control.

    Raises:
        FrankenlensError: if the package was installed without its data.
    """
    return json.loads(_data("results.json").read_text(encoding="utf-8"))


def _data(name: str) -> Path:
    found = Path(str(files(__name__) / name))
    if not found.exists():
        raise FrankenlensError(
            f"{found} is missing: install frankenlens from its wheel or repository, or make a triple with "
            "`frankenlens train-triple --out DIR`"
        )
    return found
