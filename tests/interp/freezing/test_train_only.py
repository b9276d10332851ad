"""Everything frozen but some components, under an optimizer that decays weights and keeps momentum."""

import pytest
import torch

from hooks import FrankenlensError, HookedVLM, weight_slices
from interp.freezing import train_only
from tests.families import tiny


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_only_the_named_components_move(family) -> None:
    bare = tiny(family)
    vlm = HookedVLM(bare.model, bare.processor, check=False)
    addresses = ["blocks.1.mlp", "blocks.0.attn.head.1", "blocks.0.attn.kv_head.0"]
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in bare.model.named_parameters()}
    for address in addresses:
        for piece in weight_slices(bare.model, vlm.anatomy, address):
            piece.of(masks[piece.parameter]).fill_(True)
    before = {name: p.detach().clone() for name, p in bare.model.named_parameters()}
    inputs = bare.inputs()
    trainable = {name: p.requires_grad for name, p in bare.model.named_parameters()}
    with train_only(bare.model, addresses) as frozen:
        optimizer = torch.optim.AdamW(bare.model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            bare.model(**inputs).logits.logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        report = frozen.report()
    assert report.loc[report["frozen"], "identical"].all()
    for name, after in bare.model.named_parameters():
        assert torch.equal(after[~masks[name]], before[name][~masks[name]]), name
        if masks[name].any():
            assert (after != before[name])[masks[name]].float().mean() > 0.9, name
    assert {name: p.requires_grad for name, p in bare.model.named_parameters()} == trainable
    bare.model(**inputs).logits.sum().backward()
    optimizer.step()  # released: the rest trains again
    parameters = bare.model.named_parameters()
    assert not any(torch.equal(p, before[name]) for name, p in parameters if p.grad is not None)


def test_what_cannot_be_is_refused() -> None:
    bare = tiny("qwen2_5_vl")
    with pytest.raises(FrankenlensError, match=r"blocks\.40"):
        train_only(bare.model, "blocks.40.mlp")
    assert all(p.requires_grad for p in bare.model.parameters())
