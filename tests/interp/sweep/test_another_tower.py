"""Edits of attention to another tower, and of what is called once an image, against plain hooks on the bare model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from interp.metrics import LogitDifference
from interp.prompts import Prompt, collate
from interp.sweep import Intervention, sweep
from tests.architectures import ARCHITECTURES, build

WORDS = (5, 11)


def opened(name: str) -> tuple[HookedVLM, list[Prompt]]:
    """A tiny model, its prompt, and the same with other pixels."""
    given = build(name)
    pixels = ARCHITECTURES[name].pixels
    assert pixels is not None
    other = given.inputs | {pixels: given.inputs[pixels].flip(-1)}
    ids = given.inputs["input_ids"]
    token = None if given.image_mask is None else int(ids[given.image_mask][0])
    roles = ["question"] * ids.shape[1] if token is None else None  # attended to, no token stands for it
    prompts = [
        Prompt.from_inputs(inputs, roles, image_token_id=token, name=str(row))
        for row, inputs in enumerate((given.inputs, other))
    ]
    return HookedVLM(given.model, inputs=given.inputs), prompts


def swept(vlm: HookedVLM, prompts: list[Prompt], one: Intervention) -> tuple[Tensor, Tensor]:
    """The metric under an intervention, and clean."""
    metric = LogitDifference(*(torch.full((len(prompts),), word) for word in WORDS))
    found = sweep(vlm, prompts, [one], metric, batch_size=len(prompts), progress=False)
    return torch.tensor(found["value"].values[0, 0]), torch.tensor(found["clean"].values[0])


@torch.no_grad()
def bare(
    model: Any, prompts: list[Prompt], path: str, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """The metric with a module's output changed, and what may differ."""
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: change(out))
    try:
        logits = model(**collate(prompts).inputs, use_cache=False).logits[:, -1].double()
    finally:
        handle.remove()
    return logits[:, WORDS[0]] - logits[:, WORDS[1]], 1e-5 * max(1.0, logits.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*Every intervention reruns all tokens")
def test_keys_of_another_tower_are_edited_whole() -> None:
    vlm, prompts = opened("mllama")
    site = vlm.anatomy.text.blocks[1].writers[0].site
    assert site is not None and site.k is not None and site.cross
    got, clean = swept(vlm, prompts, Intervention("blocks.1.cross_attn.hook_k", "scale", "all", value=-2.0))
    wanted, allowed = bare(vlm.model, prompts, site.k.module, lambda out: -2.0 * out)
    assert (got - wanted).abs().max() <= allowed
    assert (got - clean).abs().min() > 100 * allowed
    with pytest.raises(FrankenlensError, match="has no text tokens"):
        swept(vlm, prompts, Intervention("blocks.1.cross_attn.hook_k", "zero", "question"))


@pytest.mark.filterwarnings("ignore:.*Every intervention reruns all tokens")
def test_an_edge_to_another_tower_is_cut_by_its_key() -> None:
    """With every key cut, nothing is read across: what attention to the image adds is its output bias, or nothing."""
    vlm, prompts = opened("mllama")
    scores = "blocks.1.cross_attn.hook_attn_scores"
    site = vlm.anatomy.text.blocks[1].writers[0].site
    assert site is not None and site.out is not None
    got, clean = swept(vlm, prompts, Intervention(scores, "knockout", "all", source="all"))
    nothing = vlm.module(site.out).forward(torch.zeros(1, site.n_heads * site.d_value))  # type: ignore[operator]
    wanted, allowed = bare(vlm.model, prompts, site.out, lambda out: nothing.expand_as(out).clone())
    assert (got - wanted).abs().max() <= allowed
    assert (got - clean).abs().min() > 100 * allowed
    one, _ = swept(vlm, prompts, Intervention(scores, "knockout", "all", source=2))
    assert (one - clean).abs().min() > 100 * allowed and (one - got).abs().min() > 100 * allowed
    with pytest.raises(FrankenlensError, match="'image' is no key of another tower"):
        swept(vlm, prompts, Intervention(scores, "knockout", "all", source="image"))


def test_what_is_called_once_an_image_is_read_and_written_as_one() -> None:
    """LFM2-VL's projector: each prompt is given the other's image."""
    vlm, prompts = opened("lfm2_vl")
    path = vlm.anatomy.projector
    seen: list[Tensor] = []
    handle = vlm.module(path).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with torch.no_grad():
        _, cache = vlm.run_with_cache(collate(prompts).inputs, "projector.hook_out", use_cache=False)
    handle.remove()
    assert len(seen) == 2
    kept = cache.calls("projector.hook_out")
    assert len(kept) == len(seen) and all(map(torch.equal, kept, seen))
    got, clean = swept(vlm, prompts, Intervention("projector.hook_out", "resample", "all"))
    turn = iter(seen[::-1])
    wanted, allowed = bare(vlm.model, prompts, path, lambda out: next(turn))
    assert (got - wanted).abs().max() <= allowed
    assert (got - clean).abs().min() > 100 * allowed
