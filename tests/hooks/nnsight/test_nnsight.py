"""nnsight's traces give the hook names: the values, the edits and the images of our own hooks, bit for bit."""

import copy
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from tests.families import EACH_KIND, TinyVLM, tiny
from tests.hooks.reference import of_one_block, tolerance

pytest.importorskip("nnsight")
from nnsight import NNsight

from experiments import embedded
from hooks.nnsight.bridge import places
from hooks.nnsight.names import Place, get, put
from hooks.nnsight.remote import native_places


@dataclass(frozen=True)
class Case:
    bare: TinyVLM
    vlm: HookedVLM = field(repr=False)


@pytest.fixture(scope="module", params=EACH_KIND)
def case(request) -> Case:
    opened = tiny(request.param)
    return Case(opened, HookedVLM(opened.model, opened.processor))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def in_order(vlm: HookedVLM, names: Iterable[str], inputs: dict[str, Tensor]) -> list[str]:
    """Names in the order in which the model gets there; a trace must ask in that order."""
    fired: list[str] = []
    vlm.run_with_hooks(inputs, [(name, lambda a, hook: fired.append(hook.name)) for name in names])
    return fired


def test_importing_hooks_imports_neither_nnsight_nor_transformer_lens():
    code = (
        "import sys, hooks, interp; print([m for m in ('nnsight', 'transformer_lens') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_read_in_one_trace_is_the_cache_bit_for_bit(case):
    inputs, vlm = case.bare.inputs(batch=2), case.vlm
    names = in_order(vlm, vlm.hook_points, inputs)
    with vlm.trace(inputs):
        values = {name: get(name, places(vlm)) for name in names}.save()  # type: ignore[attr-defined]
    _, cache = vlm.run_with_cache(inputs)
    assert [n for n in names if not torch.equal(values[n], cache[n])] == []
    assert all(values[name].shape == cache[name].shape for name in names)


def test_every_name_written_in_a_trace_acts_as_in_run_with_hooks(case):
    inputs, vlm = case.bare.inputs(), case.vlm
    plain = vlm(inputs).logits
    unequal = []
    for name in vlm.hook_points:
        generator = torch.Generator().manual_seed(0)

        def noisy(activation: Tensor, generator=generator) -> Tensor:
            return activation * torch.empty_like(activation).uniform_(0.5, 1.5, generator=generator)

        expected = vlm.run_with_hooks(inputs, [(name, lambda a, hook, f=noisy: f(a))]).logits
        generator.manual_seed(0)
        with vlm.trace(inputs) as tracer:
            put(name, noisy(get(name, places(vlm))), places(vlm))
            logits = tracer.result.logits.save()
        if not torch.equal(logits, expected) or (logits - plain).abs().max() <= 100 * tolerance(plain):
            unequal.append(name)
    assert unequal == []


def test_names_as_attributes_with_heads_as_heads(case):
    inputs, vlm = case.bare.inputs(), case.vlm
    with vlm.trace(inputs) as tracer:
        z = vlm.blocks[1].attn.hook_z.save()
        vlm.blocks[1].attn.hook_z[:, :, 1] = 0
        halved = vlm.blocks[-1].mlp.hook_post
        vlm.blocks[-1].mlp.hook_post = halved / 2
        logits = tracer.result.logits.save()
    _, cache = vlm.run_with_cache(inputs, "blocks.1.attn.hook_z")
    assert (
        torch.equal(z, cache["z", 1]) and z.shape[2] == vlm.n_heads
    )  # saved before the edit, unharmed by it

    def zero(a: Tensor, hook: Any) -> None:
        a[:, :, 1] = 0

    last = f"blocks.{vlm.n_layers - 1}.mlp.hook_post"
    expected = vlm.run_with_hooks(
        inputs, [("blocks.1.attn.hook_z", zero), (last, lambda a, hook: a / 2)]
    ).logits
    assert torch.equal(logits, expected)
    assert len(vlm.blocks) == vlm.n_layers and "hook_pattern" in dir(vlm.blocks[0].attn)
    assert "blocks" in repr(vlm.blocks)


def test_the_model_is_untouched_by_a_trace(case):
    model, inputs = case.vlm.model, case.bare.inputs()

    def state() -> list[Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return [sorted(m.__dict__) for m in model.modules()] + [hooks, list(model.state_dict())]

    before, configs = state(), [getattr(m, "config", None) for m in model.modules()]
    with case.vlm.trace(inputs):
        case.vlm.blocks[0].attn.hook_pattern.save()
    with pytest.raises(FrankenlensError, match=r"\(3,\).*expected"), case.vlm.trace(inputs):
        case.vlm.blocks[0].hook_resid_post = torch.zeros(3)
    assert state() == before
    assert all(
        a is b for a, b in zip(configs, (getattr(m, "config", None) for m in model.modules()), strict=True)
    )
    assert torch.equal(case.vlm(inputs).logits, model(**inputs).logits)


def test_a_trace_that_asks_for_nothing_inside_attention_computes_nothing_there(case):
    """Bit-identical to the bare model: no dense attention behind a sleeping hook."""
    inputs = case.bare.inputs()
    with case.vlm.trace(inputs) as tracer:
        case.vlm.blocks[0].hook_resid_pre.save()
        logits = tracer.result.logits.save()
    assert torch.equal(logits, case.vlm.model(**inputs).logits)


def test_batched_invokes_see_their_own_rows_tokens_and_images(case):
    vlm = case.vlm
    a = case.bare.inputs(text="what color is the star ?", seed=1)
    b = case.bare.inputs(batch=2, text="how many red circle are there in row 2 and in row 3 ?", seed=2)
    names = in_order(vlm, of_one_block(vlm.hook_points), a)
    with vlm.trace() as tracer:
        with tracer.invoke(a):
            first = {name: get(name, places(vlm)) for name in names}.save()  # type: ignore[attr-defined]
            first_logits = tracer.result.logits.save()
        with tracer.invoke(b):
            second = {name: get(name, places(vlm)) for name in names}.save()  # type: ignore[attr-defined]
            second_logits = tracer.result.logits.save()
    for inputs, got, logits in ((a, first, first_logits), (b, second, second_logits)):
        output, alone = vlm.run_with_cache(inputs, names)
        off = [n for n in names if got[n].shape != alone[n].shape or not _close(got[n], alone[n])]
        assert off == []
        assert (logits - output.logits).abs().max() <= tolerance(output.logits)


def _close(a: Tensor, b: Tensor) -> bool:
    """Within the tolerance, and -inf at the same places."""
    if not torch.equal(a.isneginf(), b.isneginf()):
        return False
    a, b = a[a.isfinite()], b[b.isfinite()]
    return bool((a - b).abs().max() <= tolerance(b))


def test_batched_invokes_edit_their_own_rows_alone(case):
    """Three rows, as many as multimodal position ids have axes: [3, batch, pos] is not cut along its first one."""
    vlm = case.vlm
    a, b, c = (
        case.bare.inputs(seed=s, text=t)
        for s, t in enumerate(("what is red ?", "less ?", "how many are there"))
    )
    name = next(
        n for n in vlm.hook_points if n.startswith("vision.blocks.0") and n.endswith("hook_resid_post")
    )
    with vlm.trace() as tracer:
        with tracer.invoke(a):
            before = tracer.result.logits.save()
        with tracer.invoke(b):
            put(name, get(name, places(vlm)) * 0.5, places(vlm))
            vlm.blocks[1].attn.hook_z[:, -1, 0] = 0
            edited = tracer.result.logits.save()
        with tracer.invoke(c):
            after = tracer.result.logits.save()

    def zero(z: Tensor, hook: Any) -> None:
        z[:, -1, 0] = 0

    alone = vlm.run_with_hooks(b, [(name, lambda v, hook: v * 0.5), ("blocks.1.attn.hook_z", zero)]).logits
    for got, expected in ((before, vlm(a).logits), (edited, alone), (after, vlm(c).logits)):
        assert (got - expected).abs().max() <= tolerance(expected)
    assert (alone - vlm(b).logits).abs().max() > 100 * tolerance(alone)


def test_both_models_in_one_session():
    in_, rl = (HookedVLM(t.model, t.processor) for t in (tiny("qwen2_5_vl"), tiny("qwen2_5_vl", seed=1)))
    inputs = tiny("qwen2_5_vl").inputs()
    with in_.session():
        with rl.trace(inputs):
            donated = rl.blocks[1].hook_resid_post
        with in_.trace(inputs) as tracer:
            in_.blocks[1].hook_resid_post = donated
            logits = tracer.result.logits.save()
    _, cache = rl.run_with_cache(inputs, "blocks.1.hook_resid_post")
    expected = in_.run_with_hooks(
        inputs, [("blocks.1.hook_resid_post", lambda a, hook: cache[hook.name])]
    ).logits
    assert torch.equal(logits, expected)
    assert not torch.equal(expected, in_(inputs).logits)
    with pytest.raises(FrankenlensError, match="inside the trace of another"), in_.trace(inputs):
        rl.blocks[1].hook_resid_post.save()


def test_gradients_reach_what_was_read():
    bare = tiny("qwen2_5_vl")
    vlm, inputs = HookedVLM(bare.model, bare.processor), bare.inputs()
    with torch.enable_grad():
        with vlm.trace(inputs) as tracer:
            z = vlm.blocks[1].attn.hook_z
            loss = tracer.result.logits[0, -1].sum()
            with loss.backward():
                grad = z.grad.save()
        kept = {}

        def keep(activation: Tensor, hook: Any) -> None:
            activation.retain_grad()
            kept["z"] = activation

        vlm.run_with_hooks(inputs, [("blocks.1.attn.hook_z", keep)]).logits[0, -1].sum().backward()
    assert torch.equal(grad, kept["z"].grad) and grad.any()


def test_a_later_read_holds_the_edit_and_two_edited_reads_are_refused():
    bare = tiny("llava")
    vlm, inputs = HookedVLM(bare.model, bare.processor), bare.inputs()
    with vlm.trace(inputs):
        vlm.blocks[0].hook_attn_out[:, 0] += vlm.blocks[0].hook_attn_out[:, 1]
        again = vlm.blocks[0].hook_attn_out.save()
    _, cache = vlm.run_with_cache(inputs, "blocks.0.hook_attn_out")
    own = cache["attn_out", 0]
    assert torch.equal(again[:, 0], own[:, 0] + own[:, 1]) and torch.equal(again[:, 1:], own[:, 1:])
    with pytest.raises(FrankenlensError, match="edited in place through two"), vlm.trace(inputs):  # noqa: PT012
        first = vlm.blocks[0].hook_attn_out
        second = vlm.blocks[0].hook_attn_out
        first[:, 0] = 0
        second[:, 1] = 0


def test_what_is_absent_says_why():
    bare = tiny("llava")
    vlm, inputs = HookedVLM(bare.model, bare.processor), bare.inputs()
    assert not hasattr(vlm.blocks[0], "hook_resid_pots")
    with pytest.raises(AttributeError, match="Did you mean 'blocks.0.hook_resid_post'"):
        _ = vlm.blocks[0].hook_resid_pots
    with pytest.raises(FrankenlensError, match="vision_feature_layer"), vlm.trace(inputs):
        vlm.vision.blocks[3].hook_resid_post.save()
    with pytest.raises(FrankenlensError, match=r"inside `with vlm\.trace"):
        _ = vlm.blocks[0].hook_resid_pre
    with pytest.raises(FrankenlensError, match="use vlm.run_with_cache"), vlm.trace(inputs) as tracer:
        tracer.cache()


def test_remote_is_refused_for_a_model_that_is_here():
    bare = tiny("llava")
    vlm = HookedVLM(bare.model, bare.processor)
    with pytest.raises(FrankenlensError, match="weights are loaded here"):
        vlm.trace(bare.inputs(), remote=True)
    with pytest.raises(FrankenlensError, match="RemoteVLM"):
        vlm.session(remote=True)
    vlm.close()
    with pytest.raises(FrankenlensError, match="closed"):
        vlm.trace(bare.inputs())


UNREACHABLE = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern", "hook_result")


def test_nnsights_own_wrapped_model_gives_the_same_tensors(case):
    """The other engine on the same table: nnsight wraps a copy; every name it reaches is our own, read and written."""
    inputs, vlm = case.bare.inputs(), case.vlm
    wrapped, table = NNsight(copy.deepcopy(vlm.model)), native_places(vlm.anatomy)
    reached = [name for name in vlm.hook_points if isinstance(table[name], Place)]
    assert {n for n in vlm.hook_points if n not in reached} == {
        n for n in vlm.hook_points if n.endswith(UNREACHABLE)
    }
    order = in_order(vlm, reached, inputs)
    with wrapped.trace(**inputs):
        values = {name: get(name, table) for name in order}.save()  # type: ignore[attr-defined]
    _, cache = vlm.run_with_cache(inputs, reached)
    assert [n for n in order if not torch.equal(values[n], cache[n])] == []
    unequal = []
    for name in of_one_block(reached):
        expected = vlm.run_with_hooks(inputs, [(name, lambda a, hook: a * 0.5)]).logits
        with wrapped.trace(**inputs):
            put(name, get(name, table) * 0.5, table)
            logits = wrapped.output.logits.save()
        unequal += [] if torch.equal(logits, expected) else [name]
    assert unequal == []
    with pytest.raises(AttributeError, match="inside .*HookedVLM reaches it"), wrapped.trace(**inputs):
        get("blocks.0.attn.hook_pattern", table)


def test_remote_is_refused_for_a_folder_and_passed_on_for_a_repository_id():
    """In a process of its own, because what is sent is source, and runtime type checks cannot be sent."""
    folder = str(embedded.path("in"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.hooks.nnsight.remote_trace", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused", "sent", "equal"]
