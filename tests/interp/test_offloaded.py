"""Layers that lie on the CPU or on disk until they run: the numbers of the model in memory, from every analysis."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from accelerate import cpu_offload, disk_offload

from hooks import FrankenlensError, HookedVLM
from interp.decision import changed_weights, find_decisions, null_changes
from interp.decision.traces import Head
from interp.lens import direct_logit_attribution, logit_lens
from interp.lockstep import Moved, lockstep
from interp.map import component_map
from interp.map.attribution import attribute
from interp.pair.pair import Pair
from interp.paths.pair import pair_paths
from interp.questions.tasks import sample
from interp.sweep import Intervention, sweep

HEAD, NEURON = "blocks.4.attn.hook_result", "blocks.3.mlp.hook_post"


@pytest.fixture(scope="module")
def decisions(pair):
    return find_decisions(pair, sample("sum", 3, 5, "map"), "soft", max_new_tokens=12, progress=False)


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.slow), "disk"])
def away(pair, request, tmp_path_factory) -> Pair:
    """The pair with every layer offloaded."""
    opened = []
    for vlm in (pair.in_, pair.rl):
        model = copy.deepcopy(vlm.model)
        if request.param == "cpu":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path_factory.mktemp("offloaded")), torch.device("cpu"))
        opened.append(HookedVLM(model, vlm.processor))
    assert all(weight.is_meta for weight in opened[0].model.parameters())
    assert opened[0].absent == pair.in_.absent
    return Pair(*opened)


def _close(found: xr.Dataset, expected: xr.Dataset, name: str, effect: float) -> None:
    """The numbers of a variable, with an effect a hundred times larger than what they may differ by."""
    scale = 1e-5 * max(1.0, float(np.nanmax(np.abs(expected[name]))))
    np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=scale)
    assert effect > 100 * scale


def test_sweeps(pair, away, decisions) -> None:
    wanted = [Intervention(HEAD, "replace", index=1), Intervention(HEAD, "zero", index=0)]
    wanted += [Intervention(NEURON, "replace", index=8), Intervention(NEURON, "scale", index=12, value=-30.0)]
    wanted += [
        Intervention("blocks.4.hook_mlp_out", "replace"),
        Intervention("blocks.2.attn.hook_z", "zero", index=2),
    ]
    found, expected = (
        sweep(own.in_, decisions.prompts, wanted, decisions.metric, donor=own.rl, progress=False)
        for own in (away, pair)
    )
    moved = np.abs(expected["value"] - expected["clean"]).max("example")
    _close(found, expected, "value", float(moved.min()))


def test_maps_and_their_estimates(pair, away, decisions) -> None:
    for method in (component_map, attribute):
        found, expected = (
            method(own, decisions, points=("attn_out", "head"), roles=["all"], progress=False)
            for own in (away, pair)
        )
        _close(found, expected, "effect", float(np.abs(expected["effect"]).max()))
    found, expected = (
        attribute(own, decisions, points=("mlp_out",), roles=["all"], neurons=True, progress=False)
        for own in (away, pair)
    )
    _close(found, expected, "neuron_effect", float(np.abs(expected["neuron_effect"]).max()))


def test_lenses(pair, away, decisions) -> None:
    for method, name in ((logit_lens, "top_logit"), (direct_logit_attribution, "contribution")):
        found, expected = (method(own.in_, decisions.prompts, progress=False) for own in (away, pair))
        name = name if name in expected else next(str(v) for v in expected if expected[v].dtype.kind == "f")
        _close(found, expected, name, float(np.abs(expected[name]).max()))


def test_attributions_by_transformer_lens(pair, away, decisions) -> None:
    inputs = decisions.prompts[0].inputs
    found, expected = (own.in_.run_with_cache(inputs)[1].to_transformer_lens() for own in (away, pair))
    for theirs, ours in (
        (expected.stack_head_results(), found.stack_head_results()),
        (expected.model.W_U, found.model.W_U),
        (
            expected.logit_attrs(expected.stack_head_results(), 5),
            found.logit_attrs(found.stack_head_results(), 5),
        ),
    ):
        largest = theirs.abs().max().item()
        assert (ours - theirs).abs().max().item() <= 1e-5 * max(1.0, largest) < largest / 100


def test_paths(pair, away, decisions) -> None:
    asked: Any = dict(
        senders=["blocks.2.attn.head.1", "blocks.3.mlp"], receivers=["blocks.5.mlp", "logits"], progress=False
    )
    found, expected = (pair_paths(own, decisions, **asked) for own in (away, pair))
    name = next(str(v) for v in expected if expected[v].dtype.kind == "f")
    _close(found, expected, name, float(np.nanmax(np.abs(expected[name]))))


def test_lockstep(pair, away, decisions) -> None:
    moved = [Moved("blocks.4.attn.head.1")]
    found, expected = (
        lockstep(own.rl, own.in_, decisions.prompts[:1], moved, max_new_tokens=6, progress=False)
        for own in (away, pair)
    )
    assert str(found) == str(expected)


def test_what_must_read_a_weight_refuses_a_packed_one(pair, decisions) -> None:
    from hooks.plain import matrix, plain_weight

    class Packed(torch.nn.Linear):
        """As quantized layers are: a class of its own."""

    packed = Packed(4, 4)
    assert plain_weight(packed) is None
    with pytest.raises(
        FrankenlensError, match=r"neurons needs the numbers of a Packed, which are wrapped or packed"
    ):
        matrix(packed, "attribution of neurons")


def test_soft_decisions_that_keep_streams_and_their_null_pairs(pair, away, monkeypatch) -> None:
    """The copy of an unembedding that is not in memory works as it does."""
    for name in ("interp.decision.soft.DENSE", "interp.metrics.kinds.HELD"):
        monkeypatch.setattr(name, 0)
    examples = sample("sum", 3, 5, "map")
    found, expected = (find_decisions(own, examples, "soft", max_new_tokens=12) for own in (away, pair))
    scale = 1e-5 * max(1.0, float(np.abs(expected.rl_values).max()))
    for values in ("in_values", "rl_values"):
        np.testing.assert_allclose(getattr(found, values), getattr(expected, values), rtol=0, atol=scale)
    assert np.abs(expected.rl_values - expected.in_values).max() > 100 * scale


def test_pairs_that_learnt_nothing_are_refused_by_name(away) -> None:
    """Rounding what is not there would change nothing, and the difference would be 0."""
    for name, (vlm, change) in null_changes(away).items():
        with pytest.raises(FrankenlensError, match="is offloaded"), changed_weights(vlm.model, change):
            raise AssertionError(name)


def test_the_copy_of_an_unembedding_has_the_hooks_of_its_owner(away) -> None:
    vlm, x = away.in_, torch.randn(3, away.in_.d_model)
    plain = vlm.unembed(x)
    handle = vlm.module(vlm.anatomy.unembed).register_forward_hook(lambda module, args, out: 2 * out)
    try:
        head, doubled = Head(vlm), vlm.unembed(x)
    finally:
        handle.remove()
    assert torch.allclose(doubled, 2 * plain) and float(plain.abs().max()) > 0.1
    torch.testing.assert_close(head(x), doubled, rtol=0, atol=1e-5 * max(1.0, float(doubled.abs().max())))
