"""What cannot be frozen, and what to do instead."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from hooks import FrankenlensError
from interp.freezing.rows import Rows

_ANNOUNCED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def require_trainable_left(
    named: dict[str, Any], first: dict[int, str], rows: dict[str, Rows | None], given: Sequence[object]
) -> None:
    left = [n for n in first.values() if named[n].requires_grad and not (n in rows and rows[n] is None)]
    if not left:
        raise FrankenlensError(
            f"with {', '.join(map(str, given))} frozen nothing is left to train (parameters that take no gradient were "
            "not trained before either)"
        )


def require_in_memory(named: dict[str, Any]) -> None:
    absent = next((name for name, p in named.items() if p.is_meta), None)
    if absent is not None:
        raise FrankenlensError(
            f"{absent} is not in memory (offloaded); load the model without offloading, as training needs anyway"
        )


def adapter_of(model: nn.Module) -> str | None:
    return next((name for name, m in model.named_modules() if hasattr(m, "base_layer")), None)


def adapter_message(where: str) -> str:
    return (
        f"{where} is wrapped in an adapter, which changes what the layer computes whether or not its weights are "
        "frozen: merge it (merge_and_unload), or freeze by choosing the adapter's target modules instead"
    )


def sharded_message(name: str, part: str) -> str:
    return (
        f"{part} of {name} cannot be frozen alone: the parameters are sharded (DeepSpeed, FSDP) or were "
        "replaced, so that the optimizer does not step on this tensor. Freeze whole tensors (a layer, .attn, .mlp, "
        "vision, ...), or train data-parallel (DDP) or on one device"
    )


def written_message(name: str, by: str) -> str:
    return (
        f"{name} is frozen, and {by} wrote it: so do optimizers that swap weights in .train() and .eval() "
        "(schedule-free ones) and were stepped before the freezing, averaging, load_state_dict and merging. Make the "
        "optimizer after freezing, so that it holds nothing of it; or release(), and freeze what is there now"
    )


def launched_sharded() -> bool:
    """What `accelerate launch` announces."""
    return any(os.environ.get(key, "").lower() == "true" for key in _ANNOUNCED)


def sharded(parameter: Any) -> bool:
    """By DeepSpeed (its marks: ZeRO-3, then ZeRO-1 and 2) or FSDP (2, then 1)."""
    marked = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
    return marked or type(parameter).__name__ in ("DTensor", "FlatParameter")
