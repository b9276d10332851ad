"""Direct logit attribution: exact in its sum, by hand per component, and TransformerLens's on LLaVA."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from hooks import FrankenlensError
from interp.lens import direct_logit_attribution, grouped
from interp.lens.head import freeze
from interp.pair.pair import Pair
from interp.prompts import collate
from interp.questions.examples import Example
from tests.families import EACH_KIND, tiny
from tests.interp.lens.lens_models import bare, family, opened, prompts_of


@torch.no_grad()
@pytest.mark.parametrize("name", EACH_KIND)
@pytest.mark.parametrize("where", ["image", "all"])
def test_the_components_add_up_to_hugging_faces_logit(name, where) -> None:
    """Single logits and differences, at every token; rounding is a term of its own and small."""
    made, vlm, prompts = family(name)
    for tokens, minus in (([7, 9], None), ([7, 9], [3, 4]), (None, None)):
        found = direct_logit_attribution(vlm, prompts, tokens, minus, where=where, progress=False)
        for row, prompt in enumerate(prompts):
            logits = made.model(**prompt.inputs).logits[0]
            one = found.isel(token=found["row"].to_numpy() == row)
            at = torch.from_numpy(one["position"].to_numpy())
            expected = logits[at].max(-1).values if tokens is None else logits[at, tokens[row]]
            expected = expected if minus is None else expected - logits[at, minus[row]]
            largest = max(1, float(logits.abs().max()))
            np.testing.assert_allclose(one["contribution"].sum("component"), expected, atol=1e-5 * largest)
            np.testing.assert_allclose(one["logit"], expected, atol=1e-5 * largest)
        assert abs(found["contribution"].sum("component") - found["logit"]).max() < 1e-4
        assert abs(found["contribution"].sel(component="rounding")).max() < 1e-4
        size = abs(found["contribution"]).max("token")
        written = [
            str(c)
            for c in found["component"].to_numpy()
            if "head" in str(c) or "mlp" in str(c) or c == "embed"
        ]
        assert size.sel(component=written).min() > 1e-2


@torch.no_grad()
def test_deepstack_writes_at_image_tokens_alone_and_is_needed_for_the_sum() -> None:
    _, vlm, prompts = family("qwen3_vl")
    found = direct_logit_attribution(vlm, prompts, 7, where="all", progress=False)
    deep = found["contribution"].sel(component=["blocks.0.deepstack", "blocks.1.deepstack"])
    image = found["role"].to_numpy() == "image"
    assert (deep[:, ~image] == 0).all() and abs(deep[:, image]).min("component").max() > 1e-2
    _, cache = vlm.run_with_cache(prompts[0].inputs, lambda name: name.startswith("blocks"))
    added = (cache["resid_pre", 1] - cache["resid_post", 0])[0].double()
    rows, norm = vlm.model.lm_head.weight[7].double(), vlm.model.model.language_model.norm
    last = cache["resid_post", 2][0].double()
    scale = torch.rsqrt(last.pow(2).mean(-1) + norm.variance_epsilon)
    mine = found["row"].to_numpy() == 0
    np.testing.assert_allclose(deep[0, mine], added @ (rows * norm.weight.double()) * scale, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "idefics3"])
def test_heads_and_output_bias_by_hand(name) -> None:
    """z of each head through its own columns of W_O, the bias apart."""
    made, vlm, prompts = family(name)
    found = direct_logit_attribution(vlm, prompts[:1], 7, where="all", progress=False)
    _, seen = bare(made.model, prompts[0])
    text = (
        made.model.model.language_model
        if hasattr(made.model.model, "language_model")
        else made.model.model.text_model
    )
    scale = torch.rsqrt(seen[-1].double().pow(2).mean(-1) + text.norm.variance_epsilon)
    direction = made.model.lm_head.weight[7].double() * text.norm.weight.double()
    for layer, block in enumerate(text.layers):
        out, kept = block.self_attn.o_proj, []
        handle = out.register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0][0].clone())
        )
        made.model(**prompts[0].inputs)
        handle.remove()
        z = kept[0].double().unflatten(-1, (4, -1))
        weight = out.weight.double().unflatten(1, (4, -1))
        for head in range(4):
            expected = z[:, head] @ weight[:, head].T @ direction * scale
            got = found["contribution"].sel(component=f"blocks.{layer}.attn.head.{head}")
            np.testing.assert_allclose(got, expected, atol=1e-5)
        bias = torch.zeros(32) if out.bias is None else out.bias
        got = found["contribution"].sel(component=f"blocks.{layer}.attn.bias")
        np.testing.assert_allclose(got, bias.double() @ direction * scale, atol=1e-5)
        assert (out.bias is not None) == bool(abs(got).max() > 1e-2)


@torch.no_grad()
def test_equal_to_transformer_lens_on_llava() -> None:
    """Its `logit_attrs` of its own decompositions, on an ActivationCache made of a plain dict of our activations."""
    from transformer_lens import ActivationCache

    made, vlm, prompts = family("llava")
    names = ("hook_attn_out", "hook_mlp_out", "attn.hook_result", "hook_resid_pre", "hook_resid_post")
    batch = collate([prompts[0]])
    _, ours = vlm.run_with_cache(
        batch.inputs, lambda name: name.startswith("blocks") and name.endswith(names)
    )
    tensors = dict(ours) | {"hook_embed": ours["resid_pre", 0]}
    norm, unembed = made.model.model.language_model.norm, made.model.lm_head.weight
    tensors["ln_final.hook_scale"] = (
        ours["resid_post", 2].pow(2).mean(-1, keepdim=True) + norm.variance_epsilon
    ).sqrt()
    folded = unembed * norm.weight  # TransformerLens expects the gain of the final norm inside W_U

    def directions(tokens: int) -> Tensor:
        return folded[tokens]

    config = SimpleNamespace(
        n_layers=3, n_heads=4, normalization_type="RMSPre", attn_only=False, use_attn_result=True
    )
    config.final_rms = True
    fake: Any = SimpleNamespace(cfg=config, tokens_to_residual_directions=directions)
    theirs = ActivationCache(tensors, fake)
    stack, labels = theirs.decompose_resid(return_labels=True)
    heads, head_labels = theirs.stack_head_results(return_labels=True)
    for minus in (None, 4):
        found = direct_logit_attribution(vlm, prompts[:1], 7, minus, where="all", progress=False)
        parts = grouped(found)["contribution"]
        theirs_parts = theirs.logit_attrs(stack, 7, minus)[:, 0]
        for label, value in zip(map(str, labels), theirs_parts, strict=True):
            layer, _, kind = label.partition("_")
            name = "embed" if label == "embed" else f"blocks.{layer}.{kind.removesuffix('_out')}"
            np.testing.assert_allclose(parts.sel(component=name), value, atol=1e-5)
        for label, value in zip(head_labels, theirs.logit_attrs(heads, 7, minus)[:, 0], strict=True):
            layer, head = label[1:].split("H")
            got = found["contribution"].sel(component=f"blocks.{layer}.attn.head.{head}")
            np.testing.assert_allclose(got, value, atol=1e-5)
        assert theirs_parts.abs().max() > 0.5
        assert len(labels) == 7 and len(head_labels) == 12


def test_groups_add_up_and_single_components_are_the_same() -> None:
    _, vlm, prompts = family("qwen3_vl")
    found = direct_logit_attribution(vlm, prompts, 7, where="image", progress=False)
    for per, some in (
        ("sublayer", {"blocks.1.attn", "blocks.1.deepstack"}),
        ("layer", {"embed", "blocks.1"}),
    ):
        parts = grouped(found, per)
        assert some <= set(parts["component"].to_numpy())
        np.testing.assert_allclose(parts["contribution"].sum("component"), found["logit"], atol=1e-5)
    names = ["blocks.1.attn.head.2", "embed"]
    alone = direct_logit_attribution(vlm, prompts, 7, where="image", components=names, progress=False)
    xr.testing.assert_allclose(alone, found.sel(component=names), atol=1e-12)
    with pytest.raises(FrankenlensError, match="no grouping"):
        grouped(found, "head")


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_one_token_and_prompts_without_an_image(name) -> None:
    """Text alone, and beside a prompt with an image (for Qwen3-VL DeepStack then writes in one row)."""
    made = tiny(name)
    vlm, seeing = opened(made), prompts_of(made)[0]
    blind = seeing.builder.build(Example("blind", (), "how many red", "3"))
    for prompts in ([blind], [seeing], [blind, seeing]):
        found = direct_logit_attribution(vlm, prompts, 7, progress=False)
        expected = [float(made.model(**prompt.inputs).logits[0, -1, 7]) for prompt in prompts]
        np.testing.assert_allclose(found["contribution"].sum("component"), expected, atol=1e-5)
        np.testing.assert_allclose(found["logit"], expected, atol=1e-5)


@torch.no_grad()
def test_a_pair_is_each_model_alone() -> None:
    first, second = tiny("llava", 0), tiny("llava", 1)
    pair = Pair(opened(first), opened(second))
    prompts = prompts_of(first)
    both = direct_logit_attribution(pair, prompts, [7, 9], [3, 4], progress=False)
    for name, vlm in (("in", pair.in_), ("rl", pair.rl)):
        alone = direct_logit_attribution(vlm, prompts, [7, 9], [3, 4], progress=False)
        xr.testing.assert_equal(both.sel(model=name, drop=True), alone)
    with pytest.raises(FrankenlensError, match="give `tokens`"):
        direct_logit_attribution(pair, prompts, progress=False)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"components": ["blocks.1.attn.head.4"]},
            r"no component 'blocks.1.attn.head.4'.*blocks 0-2 with heads 0-3",
        ),
        ({"tokens": [1, 10_000]}, r"prompt 1 \('e1'\): `tokens` is 10000"),
        ({"minus": [1]}, "`minus` holds 1 token ids for 2 prompts"),
        ({"where": [-999]}, r"prompt 0 \('e0'\)"),
    ],
)
def test_what_does_not_exist_is_named(given, match) -> None:
    _, vlm, prompts = family("llava")
    with pytest.raises(FrankenlensError, match=match):
        direct_logit_attribution(vlm, prompts, **{"tokens": 1, "progress": False, **given})


@torch.no_grad()
def test_a_layer_norm_is_centred_and_its_bias_a_term_of_its_own() -> None:
    """torch's own layer norm against its linearization, part by part."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(16)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_()
    parts, row = torch.randn(5, 7, 16).double(), torch.randn(7, 16).double()
    frozen = freeze(norm.double(), parts.sum(0))
    assert frozen.centred
    added = torch.einsum("ntd,td->nt", parts, frozen.directions(row)).sum(0) + row @ frozen.bias
    torch.testing.assert_close(added, (norm(parts.sum(0)) * row).sum(-1))
    assert (row @ frozen.bias).abs().max() > 0.1
    with pytest.raises(FrankenlensError, match="neither a layer norm nor an RMS norm"):
        freeze(nn.Softmax(-1), torch.randn(3, 16))


@torch.no_grad()
def test_an_architecture_with_another_writer_is_refused(monkeypatch) -> None:
    """DeepStack forgotten: the remainder is no rounding."""
    from interp.lens import attribution

    made = tiny("qwen3_vl")
    vlm, prompts = opened(made), prompts_of(made)
    monkeypatch.setattr(attribution, "_deepstack_layers", lambda vlm: range(0))
    with pytest.raises(FrankenlensError, match="something else writes to the residual stream"):
        direct_logit_attribution(vlm, prompts, 7, where="image", progress=False)
