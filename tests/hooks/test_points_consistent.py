"""After a write, every other point shows what the model now computes: the transformer's equations hold between them."""

import pytest
import torch
from torch import Tensor

from hooks import HookedVLM
from tests.families import EACH_KIND, tiny
from tests.hooks.reference import (
    Block,
    mix,
    of_one_block,
    parts,
    result_of,
    scores_of,
    text_allowed,
    tolerance,
    vision_allowed,
)

Equations = dict[str, tuple[Tensor, Tensor]]


def block_equations(block: Block, seen: dict[str, Tensor], allowed: Tensor) -> Equations:
    """Point -> (its value, what the points before it make it)."""
    bias = 0 if block.out.bias is None else block.out.bias
    q, k = (seen.get(f"attn.hook_rot_{x}", seen[f"attn.hook_{x}"]) for x in "qk")
    after = {
        "attn.hook_attn_scores": scores_of(q, k, allowed),
        "attn.hook_pattern": seen["attn.hook_attn_scores"].softmax(-1),
        "attn.hook_z": mix(seen["attn.hook_pattern"], seen["attn.hook_v"]),
        "attn.hook_result": result_of(seen["attn.hook_z"], block.out),
        "hook_attn_out": seen["attn.hook_result"].sum(-2) + bias,
        "hook_resid_mid": seen["hook_resid_pre"] + seen["hook_attn_out"],
        "hook_mlp_out": block.down(seen["mlp.hook_post"]),
        "hook_resid_post": seen["hook_resid_mid"] + seen["hook_mlp_out"],
    }
    return {name: (seen[name], value) for name, value in after.items()}


def equations(model, family: str, inputs: dict[str, Tensor], seen: dict[str, Tensor]) -> Equations:
    """Every equation between the points of one forward pass."""
    where = parts(model, family)
    found: Equations = {}
    for prefix, blocks in (("", where.text), ("vision.", where.vision)):
        for i, block in enumerate(blocks):
            name = f"{prefix}blocks.{i}."
            own = {key.removeprefix(name): value for key, value in seen.items() if key.startswith(name)}
            if not own:  # dead
                continue
            allowed = (
                vision_allowed(model, family, inputs, i) if prefix else text_allowed(inputs["attention_mask"])
            )
            found |= {name + point: pair for point, pair in block_equations(block, own, allowed).items()}
            before = f"{prefix}blocks.{i - 1}."
            if i:
                post = seen[before + "hook_resid_post"].clone()
                if before + "hook_deepstack" in seen:
                    post[inputs["input_ids"] == model.config.image_token_id] += seen[
                        before + "hook_deepstack"
                    ]
                found[name + "hook_resid_pre"] = (own["hook_resid_pre"], post)
    at_image = inputs["input_ids"] == model.config.image_token_id
    found["hook_embed"] = (seen["hook_embed"][at_image], seen["projector.hook_out"].flatten(0, -2))
    found["blocks.0.hook_resid_pre"] = (seen["blocks.0.hook_resid_pre"], seen["hook_embed"])
    return found


@pytest.mark.parametrize("family", EACH_KIND)
def test_equations_hold_after_every_write(family):
    bare, opened = tiny(family), tiny(family)
    vlm = HookedVLM(opened.model, opened.processor)
    inputs = bare.inputs(batch=2)  # right padding: no row is without a key
    lines = []
    for name in of_one_block(vlm.hook_points):
        seen: dict[str, Tensor] = {}
        edit = (name, lambda a, hook: a + 0.1 * torch.randn(a.shape))
        readers = [
            (n, lambda a, hook, seen=seen: seen.update({hook.name: a.clone()})) for n in vlm.hook_points
        ]
        with torch.no_grad():
            vlm.run_with_hooks(inputs, fwd_hooks=[edit, *readers])
            checked = equations(bare.model, family, inputs, seen)
        for point, (value, computed) in checked.items():
            off = ~torch.isclose(value, computed, rtol=0, atol=tolerance(value))
            if point == name:
                if not off.any():
                    lines.append(f"{name}: the write is not seen at the point itself")
            elif off.any():
                lines.append(f"{point} does not follow after {name} was written")
    assert lines == []
