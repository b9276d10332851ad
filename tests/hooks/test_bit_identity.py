"""An opened model is the model: same logits, weights, files and attention settings, and SDPA wherever nothing looks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedVLM
from tests.families import EACH_KIND, tiny
from tests.hooks.reference import tolerance


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def settings(model: Any) -> dict[str, Any]:
    """What opening must leave alone, module by module."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        state[name] = (
            id(module),
            type(module),
            id(config),
            getattr(config, "_attn_implementation", None),
            "forward" in vars(module),
            type(module).forward,
        )
    return state


def hooks_installed(model: Any) -> dict[str, int]:
    """Number of hooks by module; transformers installs some of its own at a model's first forward pass."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {name: sum(len(getattr(m, kind)) for kind in kinds) for name, m in model.named_modules()}


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("batch", "padding_side"), [(1, "right"), (2, "right"), (2, "left")])
@pytest.mark.parametrize("family", EACH_KIND)
def test_logits_with_nothing_attached_are_bit_identical(family, batch, padding_side):
    vlm = tiny(family)
    assert vlm.model.config._attn_implementation == "sdpa"
    inputs = vlm.inputs(batch=batch, padding_side=padding_side)
    bare = logits(vlm.model, inputs)
    opened = HookedVLM(vlm.model, vlm.processor)
    with torch.no_grad():
        assert torch.equal(opened(inputs).logits, bare)
    assert torch.equal(logits(opened.model, inputs), bare)
    opened.close()
    assert torch.equal(logits(vlm.model, inputs), bare)


@pytest.mark.parametrize("family", EACH_KIND)
def test_text_without_image(family):
    vlm = tiny(family)
    inputs = vlm.inputs(n_images=0)
    bare = logits(vlm.model, inputs)
    opened = HookedVLM(vlm.model, vlm.processor)
    with torch.no_grad():
        assert torch.equal(opened(inputs).logits, bare)
        output, cache = opened.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern")
    assert cache["blocks.1.attn.hook_pattern"].sum(-1).sub(1).abs().max() < 1e-5
    assert (output.logits - bare).abs().max() <= tolerance(bare)


@pytest.mark.parametrize("family", EACH_KIND)
def test_opening_running_and_closing_leaves_the_model_as_it_was(family, tmp_path):
    vlm = tiny(family)
    inputs = vlm.inputs(batch=2)
    before, weights = settings(vlm.model), {k: v.clone() for k, v in vlm.model.state_dict().items()}
    requires = {k: p.requires_grad for k, p in vlm.model.named_parameters()}
    files = saved(vlm.model, tmp_path / "bare")
    bare = logits(vlm.model, inputs)
    own_hooks = hooks_installed(vlm.model)

    opened = HookedVLM(vlm.model, vlm.processor)
    open_settings = settings(vlm.model)
    assert saved(vlm.model, tmp_path / "open") == files
    attached = hooks_installed(vlm.model)
    patterns = [f"{prefix}blocks.1.attn.hook_pattern" for prefix in ("", "vision.")]
    with torch.no_grad():
        opened.run_with_hooks(inputs, fwd_hooks=[(name, lambda a, hook: a * 0.5) for name in patterns])
    assert settings(vlm.model) == open_settings
    assert hooks_installed(vlm.model) == attached
    assert saved(vlm.model, tmp_path / "used") == files

    opened.close()
    assert settings(vlm.model) == before
    assert hooks_installed(vlm.model) == own_hooks
    assert torch.equal(logits(vlm.model, inputs), bare)
    assert saved(vlm.model, tmp_path / "closed") == files
    state = vlm.model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[k], v) for k, v in weights.items())
    assert {k: p.requires_grad for k, p in vlm.model.named_parameters()} == requires
    assert all(p.grad is None for p in vlm.model.parameters())
    assert not vlm.model.training


@pytest.mark.parametrize("family", EACH_KIND)
def test_attention_setting_is_the_users_while_the_model_is_open(family):
    """A custom name in the configuration would be seen by everyone who copies or saves it."""
    vlm = tiny(family)
    before = settings(vlm.model)
    HookedVLM(vlm.model, vlm.processor)
    assert settings(vlm.model) == before


@pytest.mark.parametrize("family", EACH_KIND)
def test_hooks_within_a_context_go_with_it(family):
    vlm = tiny(family)
    inputs = vlm.inputs()
    opened = HookedVLM(vlm.model, vlm.processor)
    name = "blocks.0.hook_attn_out"
    with torch.no_grad():
        bare = opened(inputs).logits
        with opened.hooks(fwd_hooks=[(name, lambda a, hook: a * 0)]):
            inside = opened(inputs).logits
            with opened.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda a, hook: a * 0)]):
                both = opened(inputs).logits
            assert torch.equal(opened(inputs).logits, inside)
        assert torch.equal(opened(inputs).logits, bare)
        assert torch.equal(opened.run_with_hooks(inputs, [(name, lambda a, hook: a * 0)]).logits, inside)
    assert not torch.equal(inside, bare) and not torch.equal(both, inside)


@pytest.mark.parametrize(
    "name", ("blocks.0.hook_resid_mid", "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_rot_k")
)
@pytest.mark.parametrize("family", EACH_KIND)
def test_hooks_act_however_the_model_is_called(family, name):
    """Trainers and evaluation harnesses hold the model, not its wrapper."""
    vlm = tiny(family)
    inputs = vlm.inputs(batch=2)
    opened = HookedVLM(vlm.model, vlm.processor)
    hook = (name, lambda a, hook: a.flip(-2))
    with torch.no_grad():
        expected = opened.run_with_hooks(inputs, fwd_hooks=[hook]).logits
        with opened.hooks(fwd_hooks=[hook]):
            assert torch.equal(vlm.model(**inputs).logits, expected)
        assert not torch.equal(vlm.model(**inputs).logits, expected)


@pytest.mark.parametrize("family", EACH_KIND)
def test_bfloat16_logits_are_bit_identical_and_patterns_can_be_read(family):
    vlm = tiny(family)
    vlm.model.to(torch.bfloat16)
    inputs = vlm.inputs(batch=2)
    bare = logits(vlm.model, inputs)
    opened = HookedVLM(vlm.model, vlm.processor)
    with torch.no_grad():
        assert torch.equal(opened(inputs).logits, bare)
        output, cache = opened.run_with_cache(inputs)
    wide = {name for name, value in cache.items() if value.dtype != torch.bfloat16}
    assert all(name.endswith("hook_result") and cache[name].dtype == torch.float32 for name in wide)
    real = inputs["attention_mask"].bool()
    assert (output.logits - bare)[real].abs().max() <= 0.1 * bare.abs().max()


@pytest.mark.parametrize("family", EACH_KIND)
def test_two_models_open_at_once_do_not_meet(family):
    one, two = tiny(family, 0), tiny(family, 1)
    inputs = one.inputs()
    bare = logits(two.model, inputs)
    first, second = HookedVLM(one.model, one.processor), HookedVLM(two.model, two.processor)
    name = "blocks.0.attn.hook_pattern"
    with torch.no_grad(), first.hooks(fwd_hooks=[(name, lambda a, hook: a * 0)]):
        assert torch.equal(second(inputs).logits, bare)
    first.close()
    with torch.no_grad():
        _, cache = second.run_with_cache(inputs, names_filter=name)
    assert cache[name].shape[1] == second.n_heads
    assert torch.equal(logits(two.model, inputs), bare)


@pytest.fixture
def sdpa_calls(monkeypatch) -> list[int]:
    """Grows by one with every call of PyTorch's scaled dot-product attention."""
    calls: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("point", ("hook_pattern", "hook_attn_scores"))
@pytest.mark.parametrize("family", EACH_KIND)
def test_looking_at_a_pattern_takes_only_its_own_layer_off_sdpa(family, point, sdpa_calls):
    vlm = tiny(family)
    inputs = vlm.inputs(batch=2)
    eager_model = copy.deepcopy(vlm.model)
    eager_model.set_attn_implementation("eager")
    eager = logits(eager_model, inputs)
    sdpa_calls.clear()
    bare = logits(vlm.model, inputs)
    all_layers = len(sdpa_calls)
    opened = HookedVLM(vlm.model, vlm.processor)
    real = inputs["attention_mask"].bool()
    windows = {"qwen2_vl": 2, "qwen2_5_vl": 6 + 4, "qwen3_vl": 2}.get(family, 1)
    for name, own_calls in ((f"blocks.1.attn.{point}", 1), (f"vision.blocks.0.attn.{point}", windows)):
        for hook in (lambda a, hook: None, lambda a, hook: a):
            sdpa_calls.clear()
            with torch.no_grad():
                output = opened.run_with_hooks(inputs, fwd_hooks=[(name, hook)]).logits
            assert len(sdpa_calls) == all_layers - own_calls, name
            assert (output - eager)[real].abs().max() <= tolerance(eager), name
    sdpa_calls.clear()
    with torch.no_grad():
        assert torch.equal(opened(inputs).logits, bare)
    assert len(sdpa_calls) == all_layers


@pytest.mark.parametrize("family", EACH_KIND)
def test_points_around_the_attention_leave_every_layer_on_sdpa(family, sdpa_calls):
    vlm = tiny(family)
    inputs = vlm.inputs(batch=2)
    opened = HookedVLM(vlm.model, vlm.processor)
    sdpa_calls.clear()
    bare = logits(vlm.model, inputs)
    all_layers = len(sdpa_calls)
    names = [n for n in opened.hook_points if not n.endswith(("hook_pattern", "hook_attn_scores"))]
    sdpa_calls.clear()
    with torch.no_grad():
        output, _ = opened.run_with_cache(inputs, names_filter=names)
    assert len(sdpa_calls) == all_layers
    assert torch.equal(output.logits, bare), "reading changed the logits"


@pytest.mark.parametrize("family", EACH_KIND)
def test_eager_model_can_be_opened(family):
    vlm = tiny(family)
    vlm.model.set_attn_implementation("eager")
    inputs = vlm.inputs(batch=2)
    bare, before = logits(vlm.model, inputs), settings(vlm.model)
    opened = HookedVLM(vlm.model, vlm.processor)
    with torch.no_grad():
        assert torch.equal(opened(inputs).logits, bare)
        output, cache = opened.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern")
    real = inputs["attention_mask"].bool()
    assert (output.logits - bare)[real].abs().max() <= tolerance(bare)
    assert cache["blocks.1.attn.hook_pattern"].shape[1] == opened.n_heads
    opened.close()
    assert settings(vlm.model) == before
