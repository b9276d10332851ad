"""The sweep on other blocks than attention and then an MLP: each intervention against one full forward.

The expected numbers come from Hugging Face's own forward under a plain hook on one point, one prompt at a time.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from hooks import HookedVLM
from interp.metrics import LogitDifference
from interp.prompts import Prompt, collate
from interp.sweep import Intervention, sweep
from tests.architectures import build

TAKEN_UP = {
    "olmo2": "norms behind both writers and none before them",
    "qwen3_5": "mixers in most layers, a gate behind attention in the others",
    "qwen3_vl_moe": "experts, DeepStack",
    "llava+cohere2": "attention and MLP side by side",
    "granite": "a residual multiplier",
    "gpt2": "Conv1D, blocks called with positional arguments",
    "gpt_oss": "sinks in the softmax",
    "gemma2": "norms behind both writers, soft-capped scores and logits",
}
"""Architectures whose clean run is taken up at a token, each for another reason."""
LONGER = {
    "gemma4+shared_keys": "layers that hand keys on: a rerun must not leave its own there",
    "llama4": "experts that get every token",
    "falcon_h1": "attention and a mixer side by side",
}
"""Architectures that go the longer way, each for another reason; the numbers are the same."""
SLOW = ("falcon_h1", "gpt_oss", "granite")


def prompts_of(name: str) -> tuple[HookedVLM, HookedVLM, list[Prompt]]:
    """Two models of an architecture, and two prompts of different lengths."""
    given, other = build(name), build(name, seed=1)
    ids = given.inputs["input_ids"]
    token = None if given.image_mask is None else int(ids[given.image_mask][0])
    shorter = {k: v[:, :-2] if v.shape[:2] == ids.shape else v for k, v in given.inputs.items()}
    prompts = [
        Prompt.from_inputs(inputs, image_token_id=token, name=str(row))
        for row, inputs in enumerate((given.inputs, shorter))
    ]
    return HookedVLM(given.model, inputs=given.inputs), HookedVLM(other.model, inputs=other.inputs), prompts


def interventions(vlm: HookedVLM) -> list[Intervention]:
    """Every kind of point of a first, a middle and the last block, replaced, scaled, at one token and at all."""
    found = []
    for layer in sorted({0, 1, vlm.n_layers // 2, vlm.n_layers - 1}):
        for name, point in vlm.hook_points.items():
            if not name.startswith(f"blocks.{layer}.") or point.axes[0] != "batch" or "key" in point.axes:
                continue
            index = 1 if {"head", "d_mlp", "expert"} & set(point.axes) else None
            found.append(Intervention(name, "replace", -4, index=index))
            found.append(Intervention(name, "scale", "question", index=index, value=-4.0))
        pattern = f"blocks.{layer}.attn.hook_attn_scores"
        if pattern in vlm.hook_points:
            found.append(Intervention(pattern, "knockout", -1, source=-5))
    return found


def expected(vlm: HookedVLM, donor: HookedVLM, prompt: Prompt, one: Intervention) -> torch.Tensor:
    """The logits of a full forward of one prompt, with the edit as a function written here."""
    n = len(prompt)
    tokens = list(range(n)) if one.where == "all" else prompt.positions("question").tolist()
    if isinstance(one.where, int):
        tokens = [n + one.where]
    with torch.no_grad():
        _, cache = donor.run_with_cache(prompt.inputs, one.hook)

    def write(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        out = activation.clone()
        if one.kind == "knockout":
            assert isinstance(one.source, int)
            out[:, :, tokens, n + one.source] = -torch.inf
            return out
        place: Any = (slice(None), tokens)
        factor: Any = one.value
        if one.index is not None:
            place = (*place, one.index)
        out[place] = cache[one.hook][place] if one.kind == "replace" else out[place] * factor
        return out

    with torch.no_grad():
        return vlm.run_with_hooks(prompt.inputs, [(one.hook, write)]).logits[0, -1]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in (*TAKEN_UP, *LONGER)]
)
def test_a_sweep_is_one_full_forward_per_intervention(name: str) -> None:
    vlm, donor, prompts = prompts_of(name)
    wanted = interventions(vlm)
    metric = LogitDifference(torch.tensor([5, 7]), torch.tensor([11, 12]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in LONGER else "error")  # such as that the longer way is gone
        result = sweep(vlm, prompts, wanted, metric, donor=donor, progress=False)
    got, clean = result["value"].values[0], result["clean"].values[0]
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            bare = vlm.model(**collate([prompt]).inputs).logits[0, -1]
        allowed = 1e-5 * max(1.0, bare.abs().max().item())
        moved: dict[str, list[bool]] = {}
        for number, one in enumerate(wanted):
            logits = expected(vlm, donor, prompt, one)
            value = float(logits[(5, 7)[row]] - logits[(11, 12)[row]])
            assert abs(got[number, row] - value) <= allowed, one.name
            leaf = one.hook.rpartition(".")[2]
            moved.setdefault(leaf, []).append(abs(value - clean[row]) > 100 * allowed)
        assert all(any(some) for some in moved.values()), {
            leaf for leaf, some in moved.items() if not any(some)
        }
    assert np.isfinite(got).all()
