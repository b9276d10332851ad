"""The projector of models whose decoder reads the image by cross-attention, and puts no image among its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import frankenlens as fl
from tests.architectures import build

PROJECTOR = "model.multi_modal_projector"


@torch.no_grad()
def halved(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Next-token logits with half of what the projector says, by a plain hook."""
    handle = model.get_submodule(PROJECTOR).register_forward_hook(lambda *call: call[2] * 0.5)
    logits = model(**inputs, use_cache=False).logits[0, -1]
    handle.remove()
    return logits


@pytest.mark.filterwarnings("ignore:.*cannot be taken up at a stored token")
def test_what_cross_attention_reads_is_the_projectors() -> None:
    made = build("mllama")
    vlm = fl.HookedVLM(made.model, inputs=made.inputs)
    assert vlm.anatomy.projector == vlm.anatomy.projector_weights == PROJECTOR
    seen: list[Tensor] = []
    keys = made.model.get_submodule("model.language_model.layers.1.cross_attn.k_proj")
    handle = keys.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    output, cache = vlm.run_with_cache(made.inputs, "projector.hook_out", use_cache=False)
    handle.remove()
    assert torch.equal(cache["projector.hook_out"].reshape(seen[0].shape), seen[0])
    clean, cut = output.logits[0, -1].detach(), halved(made.model, made.inputs)
    prompt = fl.Prompt.from_inputs(made.inputs, image_token_id=vlm.image_token_id)
    metric = fl.LogitDifference(a=torch.tensor([3]), b=torch.tensor([7]))
    scaled = fl.Intervention("projector.hook_out", "scale", "image", value=0.5)
    found = float(fl.sweep(vlm, [prompt], [scaled], metric, progress=False)["value"].to_numpy().ravel()[0])
    allowed = 1e-5 * max(1.0, float(clean.abs().max()))
    assert abs(found - float(cut[3] - cut[7])) < allowed
    assert abs(float(cut[3] - cut[7]) - float(clean[3] - clean[7])) > 100 * allowed


def test_where_the_towers_output_is_read_as_it_is_there_is_none() -> None:
    made = build("idefics")
    vlm = fl.HookedVLM(made.model, inputs=made.inputs)
    assert not vlm.anatomy.projector and "projector" in vlm.anatomy.absent
    with pytest.raises(fl.FrankenlensError, match="projector that could be told apart"):
        vlm.require("projector", "patching the projector")
