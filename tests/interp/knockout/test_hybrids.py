"""Cuts in a model of which only some layers attend: against plain masks on those, and told where none does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooks import FrankenlensError, HookedVLM
from interp.attention.shift import attention_mass
from interp.knockout import Knockout, knockout_effects
from interp.metrics import LogitDifference
from interp.prompts import Prompt, collate
from tests.architectures import build


@torch.no_grad()
def test_a_cut_acts_where_layers_attend_and_nowhere_else() -> None:
    given = build("qwen3_5")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    attends = [layer for layer, block in enumerate(vlm.anatomy.text.blocks) if block.site is not None]
    assert 0 < len(attends) < vlm.n_layers
    prompt = Prompt.from_inputs(given.inputs, image_token_id=vlm.image_token_id)
    metric = LogitDifference(torch.tensor([5]), torch.tensor([11]))
    cuts = [Knockout("image", "decision"), Knockout("image", "decision", layers=(0, vlm.n_layers - 1))]
    found = knockout_effects(vlm, [prompt], cuts, metric, progress=False)
    keys = prompt.positions("image")

    def cut(scores: torch.Tensor, hook: Any) -> None:
        scores[:, :, -1, keys] = -torch.inf

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in attends]
    bare = vlm(prompt.inputs).logits[0, -1]
    logits = vlm.run_with_hooks(collate([prompt]).inputs, hooks).logits[0, -1]
    allowed = 1e-5 * max(1.0, bare.abs().max().item())
    expected, clean = float(logits[5] - logits[11]), float(bare[5] - bare[11])
    np.testing.assert_allclose(found["value"], expected, atol=allowed)
    assert abs(expected - clean) > 100 * allowed
    none = next(layer for layer in range(vlm.n_layers) if layer not in attends)
    with pytest.raises(FrankenlensError, match="none of its layers attends"):
        knockout_effects(vlm, [prompt], [Knockout("image", "decision", layers=none)], metric)


@torch.no_grad()
def test_attention_mass_is_nan_where_a_layer_does_not_attend() -> None:
    given = build("qwen3_5")
    vlm = HookedVLM(given.model, inputs=given.inputs)
    prompt = Prompt.from_inputs(given.inputs, image_token_id=vlm.image_token_id)
    mass = attention_mass(vlm, [prompt], "question", "image")
    attends = [layer for layer, block in enumerate(vlm.anatomy.text.blocks) if block.site is not None]
    image, text = prompt.positions("image"), prompt.positions("question")
    for layer in range(vlm.n_layers):
        if layer not in attends:
            assert np.isnan(mass[layer]).all()
            continue
        name = f"blocks.{layer}.attn.hook_pattern"
        pattern = vlm.run_with_cache(prompt.inputs, name)[1][name][0]
        expected = pattern[:, text][:, :, image].sum(-1).mean(-1)
        np.testing.assert_allclose(mass[layer, :, 0], expected, atol=1e-5)
