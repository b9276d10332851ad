"""TransformerLens's tools on our caches: the numbers of its own bridge, and sums that are the model's own logits."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import ActivationCache, FrankenlensError, HookedVLM
from tests.architectures import build
from tests.families import EACH_KIND, TinyVLM, tiny, tiny_tokenizer
from tests.hooks.reference import tolerance

pytest.importorskip("transformer_lens")
TOKEN, OTHER = 7, 11


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llava() -> tuple[TinyVLM, HookedVLM]:
    bare = tiny("llava")
    return bare, HookedVLM(bare.model, bare.processor)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, llava) -> Any:
    return booted(llava[0], tmp_path_factory.mktemp("llava"))


def booted(bare: TinyVLM, folder: Path) -> Any:
    """TransformerLens's bridge on a copy of the model; it changes model and tokenizer in place."""
    from transformer_lens.model_bridge.sources.transformers import boot

    bare.model.save_pretrained(folder)
    bare.processor.save_pretrained(folder)
    return boot(str(folder), hf_model=copy.deepcopy(bare.model), tokenizer=tiny_tokenizer())


def on_bridge(bridge: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return bridge.run_with_cache(inputs["input_ids"], **rest)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance(theirs))


def user_code(cache: Any) -> dict[str, Tensor]:
    """What a user of TransformerLens writes."""
    heads, labels = cache.stack_head_results(layer=-1, return_labels=True)
    assert labels[5] == "L1H1"
    mlps, labels = cache.decompose_resid(layer=-1, mode="mlp", incl_embeds=False, return_labels=True)
    assert labels == ["0_mlp_out", "1_mlp_out", "2_mlp_out"]
    return {
        "accumulated": cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1),
        "accumulated, normed": cache.accumulated_resid(layer=-1, apply_ln=True),
        "mlps": mlps,
        "attn, normed": cache.decompose_resid(layer=2, mode="attn", incl_embeds=False, apply_ln=True),
        "heads": heads,
        "heads to a token": cache.logit_attrs(heads, TOKEN),
        "heads to a difference": cache.logit_attrs(heads, TOKEN, OTHER),
        "mlps to a token each": cache.logit_attrs(
            cache.decompose_resid(pos_slice=-1, mode="mlp", incl_embeds=False),
            torch.tensor([TOKEN, OTHER]), torch.tensor([OTHER, TOKEN]), pos_slice=-1,
        ),
        "heads before layer 2": cache.stack_head_results(2, apply_ln=True, incl_remainder=True),
        "neurons": cache.stack_neuron_results(2, neuron_slice=[1, 3], pos_slice=-1),
        "patterns": cache.stack_activation("pattern"),
        "row": cache.apply_slice_to_batch_dim(1)["z", 1],
    }  # fmt: skip


def test_user_code_gives_the_numbers_of_its_own_bridge(llava, bridge):
    bare, vlm = llava
    inputs = bare.inputs(batch=2)
    _, cache = vlm.run_with_cache(inputs)
    theirs = user_code(on_bridge(bridge, inputs)[1])
    ours = user_code(cache.to_transformer_lens(fold_ln=False))
    assert [name for name in theirs if not close(ours[name], theirs[name])] == []
    gained = user_code(cache.to_transformer_lens())["heads to a token"]
    assert (gained - theirs["heads to a token"]).abs().max() > 1000 * tolerance(gained)


def test_caches_agree_name_by_name(llava, bridge):
    bare, vlm = llava
    inputs = bare.inputs(batch=2)
    exported = vlm.run_with_cache(inputs)[1].to_transformer_lens()
    theirs = on_bridge(bridge, inputs)[1]
    shared = [name for name in exported if name in theirs.cache_dict and name != "hook_embed"]
    assert len(shared) == len(list(exported)) - 1 - 3  # but hook_embed and, layer by layer, hook_result
    off = []
    for name in shared:
        ours, other = exported[name], theirs[name]
        if name.endswith("hook_attn_scores"):  # masked: -inf here, the smallest float there
            visible = other > torch.finfo(other.dtype).min / 2
            ours, other = ours[visible & ours.isfinite()], other[visible & ours.isfinite()]
        off += [] if close(ours, other) else [name]
    assert off == []


def test_compatibility_mode_is_fold_ln_and_center_unembed(llava, tmp_path):
    bare, vlm = llava
    folded = booted(bare, tmp_path)
    folded.enable_compatibility_mode()
    inputs = bare.inputs(batch=2)
    exported = vlm.run_with_cache(inputs)[1].to_transformer_lens(center_unembed=True)
    theirs = on_bridge(folded, inputs)[1]
    # Not the heads: that mode also takes the value biases out of them, into b_O.
    for stack in (
        lambda cache: cache.accumulated_resid(layer=-1),
        lambda cache: cache.decompose_resid(layer=-1, incl_embeds=False),
    ):
        ours, other = (c.logit_attrs(stack(c), TOKEN) for c in (exported, theirs))
        assert close(ours, other)
    assert close(exported.model.W_U, folded.W_U)


@pytest.mark.parametrize("family", EACH_KIND)
def test_components_sum_to_the_stream_and_attributions_to_the_logit(family):
    bare = tiny(family)
    vlm, inputs = HookedVLM(bare.model, bare.processor), bare.inputs(batch=2)
    output, cache = vlm.run_with_cache(inputs)
    exported, logits = cache.to_transformer_lens(), output.logits
    final = cache["resid_post", vlm.n_layers - 1]
    parts, labels = exported.decompose_resid(return_labels=True)
    between = [f"{n}_deepstack" for n in range(2)] if family == "qwen3_vl" else []
    assert labels[7:] == between and close(parts.sum(0), final)
    full, labels = exported.get_full_resid_decomposition(return_labels=True)
    assert len(full) == len(labels) and labels[len(labels) - len(between) :] == between
    assert close(full.sum(0), final)
    to_token = exported.logit_attrs(parts, TOKEN).sum(0)
    assert (to_token - logits[..., TOKEN]).abs().max() <= tolerance(logits)
    direction = exported.model.W_U[:, TOKEN]
    folded = exported.get_full_resid_decomposition(apply_ln=True, project_output_onto=direction, pos_slice=-1)
    assert (folded.sum(0) - logits[:, -1, TOKEN]).abs().max() <= tolerance(logits)
    heads = exported.stack_head_results(incl_remainder=True)
    both = exported.logit_attrs(heads, torch.tensor([TOKEN, OTHER]), torch.tensor([OTHER, TOKEN])).sum(0)
    expected = (logits[..., TOKEN] - logits[..., OTHER]) * torch.tensor([[1.0], [-1.0]])
    assert (both - expected).abs().max() <= tolerance(logits)
    before_two = exported.decompose_resid(layer=2)
    assert close(before_two.sum(0), cache["resid_pre", 2])
    lens = exported.accumulated_resid(apply_ln=True) @ exported.model.W_U
    assert (lens[-1] - logits).abs().max() <= tolerance(logits)
    assert exported.logit_lens(top_k=3) is not None
    assert len(exported.apply_slice_to_batch_dim(0).decompose_resid()) == len(parts)


def test_hook_functions_written_for_transformer_lens_run_unchanged(llava, bridge):
    """In each shape in which TransformerLens's demos write them; `hook` is passed as it passes it."""
    from transformer_lens.utilities import get_act_name

    bare, vlm = llava
    inputs = bare.inputs(batch=2)
    _, clean = on_bridge(bridge, bare.inputs(batch=2, seed=1))

    def patch_stream(corrupted: Tensor, hook: Any, pos: int, clean_cache: Any) -> Tensor:
        corrupted[:, pos, :] = clean_cache[hook.name][:, pos, :]
        return corrupted

    def patch_head(z: Tensor, head_index: int, hook: Any) -> Tensor:
        assert hook.layer() == 1
        z[:, :, head_index] = 0.0
        return z

    def uniform(pattern: Tensor, hook: Any = None) -> Tensor:
        hook.ctx["seen"] = True
        return torch.tril(torch.ones_like(pattern)) / torch.arange(1, pattern.shape[-1] + 1)[:, None]

    fwd_hooks: list[Any] = [
        (get_act_name("resid_pre", 1), partial(patch_stream, pos=-3, clean_cache=clean)),
        (get_act_name("z", 1), partial(patch_head, head_index=2)),
        (get_act_name("pattern", 2), uniform),
        (lambda name: name.endswith("mlp.hook_post"), lambda post, hook: post * 0.9),
    ]
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    theirs = bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=[
        hook if isinstance(hook[0], str) else (lambda n: "blocks." in n[:7] and n.endswith("mlp.hook_post"), hook[1])
        for hook in fwd_hooks
    ], **rest)  # fmt: skip
    fwd_hooks[3] = (
        lambda name: name.startswith("blocks.") and name.endswith("mlp.hook_post"),
        fwd_hooks[3][1],
    )
    ours = vlm.run_with_hooks(inputs, fwd_hooks=fwd_hooks).logits
    real = inputs["attention_mask"].bool()
    assert (ours - theirs)[real].abs().max() <= tolerance(ours)
    assert (ours - vlm(inputs).logits)[real].abs().max() > 1000 * tolerance(ours)


def test_what_cannot_be_exported_says_why(llava):
    bare, vlm = llava
    inputs = bare.inputs()
    with pytest.raises(FrankenlensError, match="not made by a HookedVLM"):
        ActivationCache({}).to_transformer_lens()
    exported = vlm.run_with_cache(inputs)[1].to_transformer_lens()
    with pytest.raises(FrankenlensError, match="cannot run"):
        exported.model.run_with_cache(inputs)
    with pytest.raises(FrankenlensError, match="is 2 tokens"):
        exported.logit_attrs(exported.decompose_resid(), "red star")
    by_word = exported.logit_attrs(exported.decompose_resid(), "red")
    token = bare.processor.tokenizer.convert_tokens_to_ids("red")
    assert torch.equal(by_word, exported.logit_attrs(exported.decompose_resid(), token))
    assert not [name for name in exported if name.startswith(("vision", "projector"))]

    deep = tiny("qwen3_vl")
    opened = HookedVLM(deep.model, deep.processor)
    _, some = opened.run_with_cache(
        deep.inputs(), lambda n: n.endswith(("attn_out", "mlp_out", "0.hook_resid_pre"))
    )
    with pytest.raises(
        FrankenlensError, match=r"cache blocks\.0\.hook_resid_post and blocks\.1\.hook_resid_pre"
    ):
        some.to_transformer_lens().decompose_resid()
    capped = tiny("llava")
    capped.model.config.text_config.logits_scaling = 2.0
    refused = HookedVLM(capped.model, capped.processor).run_with_cache(inputs)[1]
    with pytest.raises(FrankenlensError, match="logits_scaling after its unembedding"):
        refused.to_transformer_lens()


MORE = {"falcon_h1": "0_mixer_out", "evolla": "1_cross_attn_out", "gpt2": "", "olmo2": "", "gemma3_text": ""}
"""What blocks add besides attention and MLP; GPT-2's Conv1D; norms behind parts alone, and on both sides."""


@pytest.mark.parametrize("name", MORE)
def test_whatever_blocks_add_is_a_component(name):
    given = build(name)
    vlm = HookedVLM(given.model, inputs=given.inputs)
    _, cache = vlm.run_with_cache(given.inputs)
    final = cache["resid_post", vlm.n_layers - 1]
    parts, labels = cache.to_transformer_lens().decompose_resid(return_labels=True)
    assert close(parts.sum(0), final)
    further = [part for part, label in zip(parts, labels, strict=True) if label == MORE[name]]
    assert len(further) == bool(MORE[name])
    assert all(part.abs().max() > 100 * tolerance(final) for part in further)


def test_heads_and_neurons_sum_where_nothing_stands_behind_them():
    for name, refused in (("gpt2", False), ("olmo2", True), ("gemma3_text", True)):
        given = build(name)
        vlm = HookedVLM(given.model, inputs=given.inputs)
        exported = vlm.run_with_cache(given.inputs)[1].to_transformer_lens()
        if refused:
            with pytest.raises(FrankenlensError, match="block 0 a norm or a factor stands between"):
                exported.get_full_resid_decomposition()
            continue
        parts = exported.get_full_resid_decomposition()
        assert close(parts.sum(0), exported[f"blocks.{vlm.n_layers - 1}.hook_resid_post"])


def test_a_stream_that_is_multiplied_is_not_decomposed():
    given = build("gemma4")
    exported = (
        HookedVLM(given.model, inputs=given.inputs).run_with_cache(given.inputs)[1].to_transformer_lens()
    )
    with pytest.raises(FrankenlensError, match="block 0 multiplies its whole stream.*logit_lens"):
        exported.decompose_resid()
    assert exported.accumulated_resid().isfinite().all()


def test_parts_that_were_changed_are_not_summed(llava):
    bare, vlm = llava
    exported = vlm.run_with_cache(bare.inputs())[1].to_transformer_lens()
    exported.cache_dict["blocks.0.hook_mlp_out"] = exported.cache_dict["blocks.0.hook_mlp_out"] * 1.1
    with pytest.raises(FrankenlensError, match="do not sum to blocks"):
        exported.decompose_resid()
