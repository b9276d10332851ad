"""Generation: Hugging Face's own without hooks; with hooks, the edit acts at the prefill and at every step."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hooks import HookedVLM
from tests.families import EACH_KIND, TinyVLM, tiny
from tests.hooks.interventions import intervention

STEPS = 6
GREEDY = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
EDITED = {
    "blocks.1.hook_resid_post": lambda a: a * 1.5,
    "blocks.0.hook_resid_mid": lambda a: a.flip(-1),
    "blocks.1.hook_attn_out": lambda a: -a,
    "blocks.2.hook_mlp_out": lambda a: a * 0.2,
    "blocks.1.attn.hook_q": lambda a: a.flip(-2),
    "blocks.0.attn.hook_k": lambda a: a.flip(-1),
    "blocks.0.attn.hook_v": lambda a: a.flip(-1),
    "blocks.2.attn.hook_z": lambda a: a.flip(-2),
    "blocks.1.attn.hook_result": lambda a: a * a.new_tensor([0.0, 1.0, 1.0, 3.0])[:, None],
    "blocks.1.mlp.hook_post": lambda a: a.flip(-1),
    "hook_embed": lambda a: a.flip(-1),
    "ln_final.hook_normalized": lambda a: a.flip(-1),
    "vision.blocks.1.attn.hook_z": lambda a: a.flip(-2),
    "projector.hook_out": lambda a: a.flip(-1),
}


@dataclass(frozen=True)
class Case:
    bare: TinyVLM
    vlm: HookedVLM = field(repr=False)
    inputs: dict[str, Tensor] = field(repr=False)


@pytest.fixture(scope="module", params=EACH_KIND)
def case(request) -> Case:
    opened, bare = tiny(request.param), tiny(request.param)
    vlm = HookedVLM(opened.model, opened.processor)
    return Case(bare, vlm, bare.inputs(batch=2, padding_side="left"))


def test_without_hooks_token_for_token_hugging_faces(case):
    theirs = case.bare.model.generate(**case.inputs, **GREEDY)
    assert torch.equal(case.vlm.generate(case.inputs, **GREEDY), theirs)
    assert theirs.shape[1] == case.inputs["input_ids"].shape[1] + STEPS


def test_sampling_without_hooks_draws_the_same_tokens(case):
    sampling = dict(max_new_tokens=STEPS, do_sample=True, temperature=1.0)
    torch.manual_seed(5)
    theirs = case.bare.model.generate(**case.inputs, **sampling)
    torch.manual_seed(5)
    assert torch.equal(case.vlm.generate(case.inputs, **sampling), theirs)


@pytest.mark.parametrize("name", EDITED)
def test_edit_during_generation_equals_the_same_edit_with_plain_hooks(case, name):
    edit = EDITED[name]
    with intervention(case.bare.model, case.bare.family, name, edit):
        theirs = case.bare.model.generate(
            **case.inputs, **GREEDY, return_dict_in_generate=True, output_logits=True
        )
    ours = case.vlm.generate(
        case.inputs,
        fwd_hooks=[(name, lambda a, hook: edit(a))],
        **GREEDY,
        return_dict_in_generate=True,
        output_logits=True,
    )
    clean = case.bare.model.generate(
        **case.inputs, **GREEDY, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    ours, theirs, clean = (torch.stack(out.logits) for out in (ours, theirs, clean))
    tolerance = 1e-5 * max(1, theirs.abs().max().item())
    assert (ours - theirs).abs().max() <= tolerance
    assert (theirs - clean)[0].abs().max() > 100 * tolerance


def test_edit_during_generation_equals_a_loop_without_cache(case):
    """Every step run again from the first token, with the edit at all positions."""
    name = "blocks.1.hook_resid_post"
    inputs, model = dict(case.bare.inputs()), case.bare.model
    ours = case.vlm.generate(inputs, fwd_hooks=[(name, lambda a, hook: a.flip(-1))], **GREEDY)
    for _ in range(STEPS):
        with torch.no_grad(), intervention(model, case.bare.family, name, lambda a: a.flip(-1)):
            logits = model(**inputs).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = float("-inf")
        for key, new in (("input_ids", logits.argmax(-1)), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if key in inputs:
                column = torch.as_tensor(new).reshape(1, 1).to(inputs[key])
                inputs[key] = torch.cat([inputs[key], column], dim=1)
    assert torch.equal(ours, inputs["input_ids"])


def test_hooks_see_the_prefill_and_every_step(case):
    length = case.inputs["input_ids"].shape[1]
    n_heads, n_kv_heads = case.vlm.n_heads, 2
    seen: dict[str, list[tuple[int, ...]]] = {}

    def watch(a: Tensor, hook) -> None:
        seen.setdefault(hook.name, []).append(tuple(a.shape))

    points = ("hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_rot_k", "attn.hook_pattern")
    names = [f"blocks.1.{point}" for point in points] + [
        "vision.blocks.0.hook_resid_pre",
        "projector.hook_out",
    ]
    case.vlm.generate(case.inputs, fwd_hooks=[(name, watch) for name in names], **GREEDY)
    new = [length] + [1] * (STEPS - 1)
    total = [length + i for i in range(STEPS)]
    d_head = seen["blocks.1.attn.hook_q"][0][-1]
    assert seen["blocks.1.hook_resid_pre"] == [(2, n, case.vlm.d_model) for n in new]
    assert seen["blocks.1.attn.hook_q"] == [(2, n, n_heads, d_head) for n in new]
    assert seen["blocks.1.attn.hook_k"] == [(2, n, n_kv_heads, d_head) for n in new]
    assert seen["blocks.1.attn.hook_rot_k"] == [(2, n, n_kv_heads, d_head) for n in total]
    assert seen["blocks.1.attn.hook_pattern"] == [(2, n_heads, n, k) for n, k in zip(new, total, strict=True)]
    assert len(seen["vision.blocks.0.hook_resid_pre"]) == len(seen["projector.hook_out"]) == 1


def test_pattern_edit_during_generation_equals_a_loop_without_cache(case):
    """Head 3 of layer 1 reads only the first real token: on this unpadded prompt, position 0."""
    name = "blocks.1.attn.hook_pattern"

    def first_only(a: Tensor, hook) -> Tensor:
        a = a.clone()
        a[:, 3] = 0
        a[:, 3, :, 0] = 1
        return a

    inputs = dict(case.bare.inputs())
    ours = case.vlm.generate(inputs, fwd_hooks=[(name, first_only)], **GREEDY)
    for _ in range(STEPS):
        with torch.no_grad():
            logits = case.vlm.run_with_hooks(inputs, fwd_hooks=[(name, first_only)]).logits[:, -1]
        logits[:, case.bare.model.generation_config.eos_token_id] = float("-inf")
        for key, new in (("input_ids", logits.argmax(-1)), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if key in inputs:
                column = torch.as_tensor(new).reshape(1, 1).to(inputs[key])
                inputs[key] = torch.cat([inputs[key], column], dim=1)
    assert torch.equal(ours, inputs["input_ids"])


def test_generation_leaves_no_hook_behind(case):
    plain = case.vlm.generate(case.inputs, **GREEDY)
    case.vlm.generate(case.inputs, fwd_hooks=[("hook_embed", lambda a, hook: a * 0)], **GREEDY)
    assert torch.equal(case.vlm.generate(case.inputs, **GREEDY), plain)
