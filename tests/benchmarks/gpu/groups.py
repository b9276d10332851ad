"""Which steps there are, and what time each may take."""

from __future__ import annotations

import torch

from tests.benchmarks.gpu import devices, exactness, speed
from tests.benchmarks.gpu.shapes import MODELS
from tests.benchmarks.gpu.steps import Step


def steps_of(group: str, size: str, device: torch.device) -> list[Step]:
    """The steps of a group, in their order.

    Args:
        group: "exactness", "devices", or a model's shape.
        size: of models: "full" or "tiny".
        device: they run on; in bfloat16 where it is a GPU, in float32 elsewhere.
    """
    if group in MODELS:
        return speed.steps_of(group, size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {"exactness": exactness, "devices": devices}[group].steps_of(device)


def budgets(group: str, size: str) -> dict[str, float]:
    """Name to seconds of every step of a group."""
    return {step.name: step.seconds for step in steps_of(group, size, torch.device("cpu"))}
