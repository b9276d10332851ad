"""What merging an adapter takes, from the configurations of the model and of the adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hooks.stored.checkpoint import PART
from interp.comparison.adapter import is_target
from interp.plan.work import Work

_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FLOAT32 = 4


def merging(model: nn.Module, config: Mapping[str, Any], proof: bool) -> Iterator[Work]:
    """The products s B A of all modules that the settings name, added; then two models opened, one after the other.

    Args:
        model: on the meta device.
        config: the adapter's.
        proof: whether logits are compared.
    """
    targets, ranks = config.get("target_modules"), config.get("rank_pattern") or {}
    flops = thin = 0
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not isinstance(module, _KINDS) and not hasattr(module, "nf"):
            continue
        every = targets == "all-linear" and isinstance(module, nn.Linear) and not path.endswith("lm_head")
        if not every and (targets in (None, "all-linear") or not is_target(targets, path)):
            continue
        key = next((one for one in ranks if re.match(rf"(.*\.)?({one})$", path)), None)
        rank = config.get("r", 8) if key is None else ranks[key]
        rows, columns = weight.shape[0], math.prod(weight.shape[1:])
        flops += rows * columns * (2 * rank + 1)
        thin = thin + rank * (rows + columns)
    stored = sum(one.numel() * one.element_size() for one in model.parameters())
    held = {"the adapter's matrices": thin * _FLOAT32, "parts of a tensor": 4 * PART * _FLOAT32}
    yield Work("W + s B A, read and written part by part", 1, flops, held, 2 * stored, scales=False)
    if proof:
        whole = {"a model in float32": sum(one.numel() for one in model.parameters()) * _FLOAT32}
        yield Work("the proof", 3, 0, whole, 0, scales=False)
