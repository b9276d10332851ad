"""Contexts, adapters, gradients and other people's keywords: what must not go wrong in silence."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from hooks import FrankenlensError, HookedVLM
from hooks.cache import ActivationCache
from tests.families import EACH_KIND, tiny


@pytest.fixture
def opened():
    given = tiny("qwen2_5_vl")
    return HookedVLM(given.model, given.processor), given


def _logits(vlm: HookedVLM, inputs, hooks=()):
    with torch.no_grad():
        return vlm.run_with_hooks(inputs, hooks).logits


def double(activation, hook):
    return activation * 2


def test_contexts_may_end_in_any_order(opened) -> None:
    vlm, given = opened
    seen: list[str] = []
    first = vlm.hooks([("hook_embed", lambda a, hook: seen.append("first"))])
    second = vlm.hooks([("hook_embed", lambda a, hook: seen.append("second"))])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    vlm(given.inputs())
    assert seen == ["second"]
    second.__exit__(None, None, None)
    vlm(given.inputs())
    assert seen == ["second"]


def test_a_hooks_own_memory_outlives_nested_contexts(opened) -> None:
    vlm, given = opened
    counts: list[int] = []

    def count(activation, hook):
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1
        counts.append(hook.ctx["n"])

    with vlm.hooks([("hook_embed", count)]):
        vlm(given.inputs())
        with vlm.hooks([("blocks.0.hook_mlp_out", double)]):
            vlm(given.inputs())
        vlm(given.inputs())
    assert counts == [1, 2, 3]


def test_a_hook_that_raises_leaves_nothing_behind(opened) -> None:
    vlm, given = opened
    bare = _logits(vlm, given.inputs())
    configs = {name: id(m.config) for name, m in vlm.model.named_modules() if hasattr(m, "config")}

    def interrupt(activation, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vlm.run_with_hooks(
            given.inputs(), [("blocks.1.attn.hook_pattern", interrupt), ("hook_embed", double)]
        )
    assert {name: id(m.config) for name, m in vlm.model.named_modules() if hasattr(m, "config")} == configs
    assert torch.equal(_logits(vlm, given.inputs()), bare)


def test_a_hook_that_does_not_fire_is_said(opened) -> None:
    vlm, given = opened
    text_only = {k: v for k, v in given.inputs(n_images=0).items() if k in ("input_ids", "attention_mask")}
    with pytest.raises(FrankenlensError, match=r"did not fire: vision\.blocks\.0"):
        vlm.run_with_hooks(text_only, [("vision.blocks.0.hook_resid_post", double)])


def test_a_second_opening_of_one_model_cannot_hide_the_firsts_edit(opened) -> None:
    vlm, given = opened
    other = HookedVLM(given.model, check=False)
    with (
        pytest.raises(FrankenlensError, match="another HookedVLM"),
        vlm.hooks([("blocks.0.attn.hook_pattern", double)]),
        other.hooks([("blocks.0.attn.hook_pattern", double)]),
    ):
        pass


@pytest.mark.parametrize("target", ["q_proj", "o_proj", "down_proj"])
def test_an_adapter_put_in_after_opening_is_hooked_as_one_with_its_layer(opened, target: str) -> None:
    vlm, given = opened
    inject_adapter_in_model(LoraConfig(target_modules=[target], r=2, init_lora_weights=False), given.model)
    given.model.eval()
    fresh = HookedVLM(given.model, given.processor)
    names = [
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_result",
        "blocks.1.mlp.hook_post",
        "blocks.1.hook_attn_out",
    ]
    with torch.no_grad():
        _, old = vlm.run_with_cache(given.inputs(), names)
        _, new = fresh.run_with_cache(given.inputs(), names)
    assert all(torch.equal(old[name], new[name]) for name in names)
    out: Any = fresh.module(fresh.anatomy.text.blocks[1].out)
    bias = 0 if out.bias is None else out.bias
    torch.testing.assert_close(
        new["result", 1].sum(-2) + bias, new["blocks.1.hook_attn_out"], atol=2e-5, rtol=1e-5
    )
    assert new["post", 1].shape[-1] == given.model.config.text_config.intermediate_size


@pytest.mark.parametrize("family", EACH_KIND)
def test_what_a_reading_hook_sees_lies_on_the_path_to_the_logits(family: str) -> None:
    given = tiny(family)
    vlm = HookedVLM(given.model, given.processor)
    kept = {}

    def keep(activation, hook):
        activation.retain_grad()
        kept[hook.name] = activation

    with vlm.hooks([(name, keep) for name in vlm.hook_points]):
        vlm(given.inputs()).logits.square().sum().backward()
    silent = [
        name for name, activation in kept.items() if activation.grad is None or not activation.grad.any()
    ]
    assert set(kept) == set(vlm.hook_points)
    assert not silent


def test_gradient_checkpointing_is_refused_where_it_would_forget_the_hooks(opened) -> None:
    vlm, given = opened
    given.model.train()
    given.model.gradient_checkpointing_enable()
    with pytest.raises(FrankenlensError, match="gradient_checkpointing_disable"):
        vlm.run_with_hooks(given.inputs(), [("blocks.1.attn.hook_z", double)])


def test_bf16_head_results_keep_small_differences() -> None:
    given = tiny("qwen2_5_vl")
    given.model.to(torch.bfloat16)
    vlm = HookedVLM(given.model, given.processor)
    _, cache = vlm.run_with_cache(given.inputs(), ["blocks.0.attn.hook_result", "blocks.0.attn.hook_z"])
    assert cache["result", 0].dtype == torch.float32
    out: Any = vlm.module(vlm.anatomy.text.blocks[0].out)
    out = out.weight.double().unflatten(1, (4, -1))
    exact = torch.einsum("bphd,mhd->bphm", cache["z", 0].double(), out)
    torch.testing.assert_close(cache["result", 0].double(), exact, atol=1e-5, rtol=1e-5)


def test_transformer_lens_keywords_are_not_swallowed(opened) -> None:
    vlm, given = opened
    with pytest.raises(FrankenlensError, match="stop_at_layer"):
        vlm.run_with_cache(given.inputs(), "hook_embed", stop_at_layer=1)
    with pytest.raises(FrankenlensError, match="retain_grad"):
        vlm.run_with_hooks(given.inputs(), [], bwd_hooks=[])


def test_cache_keys() -> None:
    values = {
        f"blocks.{i}.{leaf}": torch.tensor(i) for i in range(3) for leaf in ("hook_resid_post", "attn.hook_z")
    }
    cache = ActivationCache({**values, "hook_embed": torch.tensor(9)})
    assert cache["resid_post", -1] == 2
    assert cache["z", 1] == 1
    assert cache["embed"] == 9
    assert ("z", 0) in cache and ("z", 5) not in cache
    assert cache.get("nope") is None
    with pytest.raises(FrankenlensError, match=r"blocks\.1\.attn\.hook_z"):
        cache["blocks.1.attn.hook_zz"]
