"""A device that is full, and a model that lies on several: the numbers of one device with room."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hooks import HookedVLM
from interp.sweep import sweep
from tests.benchmarks.gpu.exactness import METRIC, SITES, logits_of, on, prompts_of, same, without_tf32
from tests.benchmarks.gpu.steps import Step
from tests.families import QWEN, tiny

AT_MOST = 2
"""Rows that there is memory for."""
TOO_MUCH = 1 << 50
"""Bytes that no device has."""


def steps_of(device: torch.device) -> list[Step]:
    """Both."""
    return [
        Step("several devices", 15, partial(several, device)),
        Step("out of memory", 80, partial(out_of_memory, device)),
    ]


def out_of_memory(device: torch.device) -> dict[str, Any]:
    """Every method of the pair that ships, where its allocator says that the device is full beyond two rows.

    Raises:
        AssertionError: a number differs, or more rows ran at once; names the methods.
    """
    from experiments import embedded
    from interp.pair import Pair
    from tests.methods import METHODS, Asked, differing, watched

    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"), device_map=str(device))
    asked, wrong, widths = Asked(pair), [], {}
    with without_tf32():
        for name, method in METHODS.items():
            with watched(asked) as free:
                expected = method(asked)
            with watched(asked, AT_MOST, partial(allocate, device)) as full:
                found = method(asked)
            widths[name] = [free.rows, full.rows]
            off = differing(found, expected)
            if off or full.rows > AT_MOST:
                wrong.append(f"{name}: {off or f'{full.rows} rows at once'}")
    pair.close()
    if wrong:
        raise AssertionError("; ".join(wrong))
    return {"rows_at_once_free_and_full": widths}


def allocate(device: torch.device) -> None:
    """Asks the device's own allocator for more than there is."""
    torch.empty(TOO_MUCH, dtype=torch.uint8, device=device)


def several(device: torch.device) -> dict[str, Any]:
    """A Qwen of each kind whose decoder is split over all devices, or over the one and main memory (accelerate)."""
    with without_tf32():
        return {"devices": list(map(str, others(device)))} | {
            family: split_is_whole(family, device) for family in QWEN
        }


def others(device: torch.device) -> list[Any]:
    """Where parts are put: every GPU; one GPU and main memory; a CPU alone."""
    if device.type != "cuda":
        return ["cpu"]
    n = torch.cuda.device_count()
    return list(range(n)) if n > 1 else [0, "cpu"]


def split_is_whole(family: str, device: torch.device) -> dict[str, float]:
    """Logits and a sweep of a model that is split are those of the same model on one device."""
    from accelerate import dispatch_model

    given = tiny(family)
    whole = HookedVLM(given.model.to(device), inputs=on(device, given.inputs()))
    prompts, inputs = prompts_of(whole, given), on(device, given.inputs(batch=2))
    expected = sweep(whole, prompts, list(SITES.values()), METRIC, progress=False)
    logits = logits_of(whole, inputs)
    blocks = [block.path for block in whole.anatomy.text.blocks]
    whole.close()
    model = copy.deepcopy(given.model)
    model = dispatch_model(model, device_map=device_map(model, blocks, others(device)))
    bare = logits_of(model, inputs)
    split = HookedVLM(model, inputs=on(device, given.inputs()))
    same(logits_of(split, inputs), bare, f"{family}, split")
    found = sweep(split, prompts, list(SITES.values()), METRIC, progress=False)
    off = {
        "logits": float((bare - logits).abs().max()),
        "sweep": float(abs(found["value"] - expected["value"]).max()),
    }
    allowed = 1e-5 * max(1.0, float(logits.abs().max()))
    assert max(off.values()) <= allowed, f"{family}, split: off by {off}, allowed {allowed:.3g}"
    return off


def device_map(model: Any, blocks: Sequence[str], devices: Sequence[Any]) -> dict[str, Any]:
    """Blocks shared out in turn from the first device to the last, all else on the first."""
    found = {path: devices[i * len(devices) // len(blocks)] for i, path in enumerate(blocks)}
    named = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    for name in named:
        if not any(name.startswith(f"{path}.") for path in blocks):
            found[name.rpartition(".")[0]] = devices[0]
    return found
