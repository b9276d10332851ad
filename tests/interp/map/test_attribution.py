"""Attribution patching against finite differences, against sums that must come out, and against exact patching."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.decision import find_decisions
from interp.map.attribution import attribute, attribute_within, verify
from interp.map.component_map import _map, component_map
from interp.metrics import LogitDifference
from interp.pair.pair import Pair
from interp.prompts import collate
from interp.questions.tasks import sample
from tests.families import EACH_KIND, redraw, tiny
from tests.interp.map.test_patching import _prompts

METRIC = LogitDifference(torch.tensor([30, 31]), torch.tensor([40, 41]))


def near_pair(family: str, distance: float) -> tuple[Any, HookedVLM, HookedVLM]:
    """fp64 models whose weights differ by that share of a redraw."""
    given = tiny(family)
    given.model.double()
    other = copy.deepcopy(given.model)
    redraw(other, seed=7)
    with torch.no_grad():
        for mine, theirs in zip(given.model.parameters(), other.parameters(), strict=True):
            theirs.lerp_(mine, 1 - distance)
    inputs = given.inputs()
    return given, HookedVLM(given.model, inputs=inputs), HookedVLM(other, inputs=inputs)


def within(vlm: HookedVLM, donor: HookedVLM, prompts: Any, **settings: Any):
    from interp.map.attribution import _attribute

    arguments = dict(points=("resid_pre", "attn_out", "mlp_out", "head"), roles=None, steps=0, neurons=False)
    models, both = {"r": vlm, "d": donor}, {"r": prompts, "d": prompts}
    given = {**arguments, **settings}
    return _attribute(models, both, METRIC, {"to": ("d", "r")}, batch_size=2, progress=False, **given)


@pytest.mark.parametrize("family", EACH_KIND)
def test_a_small_change_is_attributed_exactly(family: str) -> None:
    """In the limit of equal models the estimate is the effect; both halve, their difference quarters."""
    misses = []
    for distance in (2e-3, 1e-3):
        given, vlm, donor = near_pair(family, distance)
        prompts = _prompts(given, 2)
        estimate = within(vlm, donor, prompts)
        models, both = {"r": vlm, "d": donor}, {"r": prompts, "d": prompts}
        exact = _map(
            models,
            both,
            METRIC,
            {"to": ("d", "r")},
            ("resid_pre", "attn_out", "mlp_out", "head"),
            None,
            2,
            False,
        )
        assert estimate.component.values.tolist() == exact.component.values.tolist()
        np.testing.assert_array_equal(np.isnan(estimate.effect), np.isnan(exact.effect))
        misses.append(np.nanmax(np.abs(estimate.effect - exact.effect)))
        scale = np.nanmax(np.abs(exact.effect))
        assert misses[-1] < 0.1 * scale
    assert 0.15 < misses[1] / misses[0] < 0.4


@pytest.mark.parametrize("family", EACH_KIND)
def test_integrated_gradients_add_up_to_the_exact_effect(family: str) -> None:
    given, vlm, donor = near_pair(family, 0.3)
    prompts = _prompts(given, 2)
    points = ("resid_pre", "attn_out", "mlp_out")
    models, both = {"r": vlm, "d": donor}, {"r": prompts, "d": prompts}
    exact = _map(models, both, METRIC, {"to": ("d", "r")}, points, ["all"], 2, False).effect
    coarse = within(vlm, donor, prompts, points=points, roles=["all"]).effect
    fine = within(vlm, donor, prompts, points=points, roles=["all"], steps=40).effect
    assert float(np.abs(fine - exact).max()) < 0.02 * float(np.abs(exact).max())
    assert float(np.abs(fine - exact).max()) < 0.1 * float(np.abs(coarse - exact).max())
    apart = within(vlm, donor, prompts, points=points, roles=None, steps=2).effect
    whole = apart.sel(role="all")
    parts = apart.sel(role=[r for r in apart.role.values if r not in ("all", "decision")]).sum("role")
    np.testing.assert_allclose(parts, whole, atol=1e-9)


def test_neurons_add_up_to_their_mlp_and_heads_to_their_attention() -> None:
    """One model on other images: all neurons' changes through W_down are the MLP's change, heads' likewise."""
    given = tiny("qwen2_5_vl")
    vlm = HookedVLM(given.model, inputs=given.inputs())
    clean, corrupt = _prompts(given, 2), _prompts(given, 2, seed=5)
    found = attribute_within(vlm, clean, corrupt, METRIC, neurons=True, progress=False)
    effect = found.effect.sel(direction="clean_to_corrupt").mean("example")
    for layer in range(vlm.n_layers):
        mlp = effect.sel(component=f"blocks.{layer}.mlp")
        neurons = found.neuron_effect.sel(direction="clean_to_corrupt").isel(block=layer).sum("neuron")
        np.testing.assert_allclose(neurons, mlp, atol=1e-4)
        heads = sum(effect.sel(component=f"blocks.{layer}.attn.head.{h}") for h in range(vlm.n_heads))
        np.testing.assert_allclose(heads, effect.sel(component=f"blocks.{layer}.attn"), atol=1e-4)
    assert float(np.abs(effect).max()) > 0.1


def test_a_model_and_itself_differ_in_nothing_and_it_is_left_as_it_was() -> None:
    given = tiny("llava")
    vlm = HookedVLM(given.model, inputs=given.inputs())
    prompts = _prompts(given, 2)
    given.model.get_parameter(vlm.anatomy.final_norm + ".weight").requires_grad_(False)
    flags = [p.requires_grad for p in given.model.parameters()]
    with torch.no_grad():
        found = attribute_within(vlm, prompts, prompts, METRIC, steps=2, neurons=True, progress=False)
        before = vlm(collate(prompts).inputs).logits
    assert float(np.abs(found.effect).max()) == 0
    assert float(np.abs(found.neuron_effect).max()) == 0
    assert [p.requires_grad for p in given.model.parameters()] == flags
    assert all(p.grad is None for p in given.model.parameters())
    with torch.no_grad():
        assert torch.equal(vlm(collate(prompts).inputs).logits, before)


def test_bad_arguments_are_named() -> None:
    given = tiny("llava")
    vlm = HookedVLM(given.model, inputs=given.inputs())
    prompts = _prompts(given, 2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"points": ("vision",)}, "'vision' cannot be attributed"),
        ({"roles": ["answers"]}, "'answers' is no role"),
        ({"steps": -1}, "steps is -1"),
    ]
    for settings, message in cases:
        with pytest.raises(FrankenlensError, match=message):
            attribute_within(vlm, prompts, prompts, METRIC, progress=False, **settings)
    with pytest.raises(FrankenlensError, match="same roles"):
        attribute_within(vlm, prompts, prompts[:1], METRIC)


@pytest.mark.slow
def test_on_the_embedded_pair_the_strongest_are_among_those_attributed() -> None:
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    decisions = find_decisions(pair, sample("sum", 48, seed=3, split="map"), "decisive", progress=False)
    points, roles = ("mlp_out", "head"), ["question", "reasoning", "decision"]
    exact = component_map(pair, decisions, points=points, roles=roles, progress=False)
    for steps in (0, 4):
        found = attribute(pair, decisions, points=points, roles=roles, steps=steps, progress=False)
        checked = verify(found, pair, decisions, top_k=30, progress=False)
        for direction in ("rl_to_in", "in_to_rl"):
            truth = exact.effect.sel(direction=direction).mean("example").values.ravel()
            guess = found.effect.sel(direction=direction).mean("example").values.ravel()
            top = set(np.argsort(-np.abs(truth))[:10])
            caught = len(top & set(np.argsort(-np.abs(guess))[:30]))
            rank: tuple[Any, ...] = tuple(spearmanr(guess, truth))
            print(f"{found.attrs['method']} {direction}: Spearman {rank[0]:.3f}, {caught} of 10")
            assert caught == 10
            assert rank[0] > 0.95
            one = checked.sel(direction=direction)
            place = found.component.values.tolist().index(one.component.values[0])
            at = (place, roles.index(one.role.values[0]))
            np.testing.assert_allclose(
                one.exact[0], exact.effect.sel(direction=direction).mean("example").values[at], atol=1e-4
            )
            assert -1 <= float(one.spearman) <= 1
            np.testing.assert_allclose(one.worst_miss, np.abs(one.estimate - one.exact).max())
