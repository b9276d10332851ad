"""What a model of a shape takes: to open, to run with hooks, to scan, to attribute; against a plain forward's rate.

The floor of a scan is the time that the arithmetic it cannot avoid (`floor.py`, and one clean run) takes at the rate of
a plain forward of the same prompt, measured in the same process. Where a scan would not end in its time, every n-th
layer is scanned, and what all of them would take is in proportion to their floors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hooks import HookedVLM
from interp.map.attribution import attribute_within
from interp.sweep import head_map, residual_map
from tests.benchmarks.gpu.shapes import PROMPTS, SMALL, inputs_of, model_of, prompt_of
from tests.benchmarks.gpu.steps import Step, seconds_of, synchronized
from tests.benchmarks.gpu.subject import Subject, inputs_for, with_head, with_stream

EVERY = {"full": 25, "tiny": 4}
"""Tokens between the positions of a residual map."""
SHARE = 0.6
"""Of a step's time that a scan is planned to take."""
WITHIN = 0.1
"""Of the largest logit: how far a scan in bfloat16 may be from plain hooks, as in tests/hooks/test_bit_identity.py."""


def steps_of(name: str, size: str, device: torch.device, dtype: torch.dtype) -> list[Step]:
    """The steps of one shape, with the seconds that each may take."""
    own = Subject(name, size, device, dtype)
    first = [
        Step("weights", 15, partial(weights, own)),
        Step("opening", 20, partial(opening, own), ("weights",)),
        Step("forward", 10, partial(forward, own), ("opening",)),
    ]
    if name == "llama":
        return [*first, Step("head scan", 30, partial(head_scan, own, 30), ("forward",))]
    return [
        *first,
        Step("head map", 45, partial(head_scan, own, 45), ("forward",)),
        Step("residual map", 35, partial(residual_scan, own, 35), ("forward",)),
        Step("attribution", 15, partial(attribution, own), ("forward",)),
    ]


def weights(own: Subject) -> dict[str, Any]:
    """Draws them on the device."""
    model = model_of(own.name, own.size, own.device, own.dtype)
    synchronized(own.device)
    of = PROMPTS[own.name, own.size]
    own.given["model"] = model
    own.given["prompts"] = tuple(prompt_of(model, own.size, of, seed) for seed in (0, 1))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    roles = own.prompts[0].roles
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_gib": round(size / 2**30, 3),
        "dtype": str(own.dtype).removeprefix("torch."),
        "tokens": len(roles),
        "image_tokens": roles.count("image"),
    }


@torch.no_grad()
def opening(own: Subject) -> dict[str, Any]:
    """Seconds to open, first and again, against one forward of the small prompt; logits are the bare model's."""
    model = own.given["model"]
    small = {k: v.to(own.device) for k, v in inputs_of(model, own.size, SMALL, 2).items()}
    inputs = inputs_for(own)
    bare = model(**inputs, use_cache=False).logits
    plain = statistics.median(_times(own, [lambda: model(**small, use_cache=False)], 3)[0])
    taken = []
    for _ in range(2):
        if "vlm" in own.given:
            own.vlm.close()
        taken.append(seconds_of(own.device, lambda: own.given.update(vlm=HookedVLM(model, inputs=small))))
    if not torch.equal(own.vlm(inputs, use_cache=False).logits, bare):
        raise AssertionError("with nothing attached, the logits are not bit-identical to the bare model's")
    return {
        "seconds": taken[0],
        "again_s": taken[1],
        "small_forward_s": plain,
        "hook_points": len(own.vlm.hook_points),
        "absent": dict(own.vlm.absent),
    }


@torch.no_grad()
def forward(own: Subject) -> dict[str, Any]:
    """A plain forward and its rate, and how many times as long one takes with nothing attached, and with a cache."""
    inputs, vlm = inputs_for(own), own.vlm
    bare: Any = vlm.model
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(vlm.n_layers)]
    arms = {
        "plain": lambda: bare(**inputs, use_cache=False),
        "nothing attached": lambda: vlm(inputs, use_cache=False),
        "plain hooks": lambda: _with_plain_hooks(vlm, inputs),
        "cached": lambda: vlm.run_with_cache(inputs, names, use_cache=False),
    }
    times = dict(zip(arms, _times(own, list(arms.values()), 15), strict=True))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        arms["plain"]()
    plain = statistics.median(times["plain"])
    own.given |= {"forward": plain, "flops": counter.get_total_flops()}
    own.given["rate"] = own.given["flops"] / plain
    return {
        "seconds": plain,
        "tflop": own.given["flops"] / 1e12,
        "tflop_per_s": own.given["rate"] / 1e12,
        "times_plain": {
            name: statistics.median(a / b for a, b in zip(took, times["plain"], strict=True))
            for name, took in times.items()
        },
    }


def _with_plain_hooks(vlm: HookedVLM, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `cached` keeps, by PyTorch's own hooks."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, module: Any, args: Any, output: Any) -> None:
        kept[name] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for block in vlm.anatomy.text.blocks:
            handle = vlm.module(block.path).register_forward_hook(partial(keep, block.path))
            stack.callback(handle.remove)
        model: Any = vlm.model
        model(**inputs, use_cache=False)
    return kept


def head_scan(own: Subject, seconds: float) -> dict[str, Any]:
    """Every head's result from the other prompt, at all tokens."""
    floor, heads = own.floor, own.vlm.n_heads
    of_layer = [heads * floor.of_head(layer) for layer in range(own.vlm.n_layers)]

    def scan(layers: Sequence[int]) -> np.ndarray:
        found = head_map(
            own.vlm, own.prompts[:1], own.metric, donor_prompts=own.prompts[1:], layers=layers, progress=False
        )
        own.given["clean"] = float(found.clean.values[0])
        return found.value.values[:, :, 0, 0]

    found, layers, values = _scanned(own, scan, of_layer, heads, seconds)
    sites = [(0, 0), (len(layers) // 2, heads // 2), (len(layers) - 1, heads - 1)]
    plain = [with_head(own, layers[i], head) for i, head in sites]
    return {**found, **_agreement(own, [float(values[site]) for site in sites], plain)}


def residual_scan(own: Subject, seconds: float) -> dict[str, Any]:
    """The stream before every layer from the other prompt, at every 25th token."""
    floor, n_tokens = own.floor, len(own.prompts[0])
    positions = list(range(EVERY[own.size] - 1, n_tokens, EVERY[own.size]))
    of_layer = [
        sum(floor.of_residual(layer, token) for token in positions) for layer in range(own.vlm.n_layers)
    ]

    def scan(layers: Sequence[int]) -> np.ndarray:
        found = residual_map(
            own.vlm, own.prompts[:1], own.metric, donor_prompts=own.prompts[1:], layers=layers,
            positions=positions, progress=False,
        )  # fmt: skip
        own.given["clean"] = float(found.clean.values[0])
        return found.value.values[:, :, 0]

    found, layers, values = _scanned(own, scan, of_layer, len(positions), seconds)
    last = len(positions) - 1
    sites = [(0, 0), (len(layers) // 2, last // 2), (len(layers) - 1, last)]
    plain = [with_stream(own, layers[i], positions[at]) for i, at in sites]
    return {
        "every_n_tokens": EVERY[own.size],
        **found,
        **_agreement(own, [float(values[site]) for site in sites], plain),
    }


def attribution(own: Subject) -> dict[str, Any]:
    """All components' effects from gradients, against the plain forwards that its two and one backward (2x) cost."""
    clean, corrupt = own.prompts[1:], own.prompts[:1]
    run = partial(attribute_within, own.vlm, clean, corrupt, own.metric, progress=False)
    found: dict[str, Any] = {}
    took = seconds_of(own.device, lambda: found.update(effects=run()))
    effect = found["effects"]["effect"]
    if not bool(np.isfinite(effect.values[:, :, 0]).all()):
        raise AssertionError("an estimate is not a number")
    return {
        "seconds": took,
        "components": effect.sizes["component"],
        "floor_s": 4 * own.given["forward"],
        "share_of_floor": 4 * own.given["forward"] / took,
    }


def _scanned(
    own: Subject,
    scan: Callable[[Sequence[int]], np.ndarray],
    of_layer: Sequence[int],
    per_layer: int,
    seconds: float,
) -> tuple[dict[str, Any], list[int], np.ndarray]:
    """The scan, of as many layers as there is time for, and its share of the floor.

    What there is time for is told by a scan of the middle layer alone.
    """
    rate, clean, middle = own.given["rate"], own.given["flops"], own.vlm.n_layers // 2
    scan([own.vlm.n_layers - 1])  # kernels are chosen and loaded
    pilot = seconds_of(own.device, lambda: scan([middle]))
    expected = pilot * (sum(of_layer) + clean) / (of_layer[middle] + clean)
    step = max(1, math.ceil(expected / (SHARE * seconds)))
    layers = list(range(0, own.vlm.n_layers, step))
    values: dict[str, np.ndarray] = {}
    took = seconds_of(own.device, lambda: values.update(found=scan(layers)))
    unavoidable, all_of_it = clean + sum(of_layer[layer] for layer in layers), clean + sum(of_layer)
    found = {
        "seconds": took,
        "sites": len(layers) * per_layer,
        "of_sites": own.vlm.n_layers * per_layer,
        "of_all_s": took * all_of_it / unavoidable,
        "floor_s": unavoidable / rate,
        "share_of_floor": unavoidable / rate / took,
        "forwards_one_by_one_s": own.given["forward"] * own.vlm.n_layers * per_layer,
    }
    return found, layers, values["found"]


def _agreement(own: Subject, ours: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """How far a few values are from one full forward each; refused where that is more than bfloat16 explains."""
    difference = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    tolerance = (WITHIN if own.dtype != torch.float32 else 1e-5) * max(1.0, own.given["largest"])
    if not difference <= tolerance:
        raise AssertionError(
            f"{difference:.3g} from plain hooks, where {tolerance:.3g} is allowed: {list(ours)} against {list(plain)}"
        )
    effect = max(abs(value - own.given["clean"]) for value in plain)
    return {"difference": difference, "tolerance": tolerance, "largest_effect": effect}


def _times(own: Subject, arms: Sequence[Callable[[], Any]], most: int) -> list[list[float]]:
    """Seconds of each arm, in turn, after a round that does not count; for some 5 seconds, three times at least."""
    first = sum(seconds_of(own.device, arm) for arm in arms)
    rounds = min(most, max(3, int(5 / max(first, 1e-9))))
    taken: list[list[float]] = [[] for _ in arms]
    for _ in range(rounds):
        for arm, times in zip(arms, taken, strict=True):
            times.append(seconds_of(own.device, arm))
    return taken
