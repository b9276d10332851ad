"""The floor of a map: noise pairs made by hand, their cells by plain hooks, and the models left as they were."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooks import FrankenlensError, HookedVLM
from interp.decision import find_decisions, null_pair_denominator, random_changes
from interp.map import component_map, noise_cells
from interp.map.noise import _means
from interp.pair.pair import weights_sha256
from interp.prompts import collate
from tests.interp.decision.test_decision import SETTINGS, examples, made_pair

HOOKS = {"blocks.1.mlp": "blocks.1.hook_mlp_out", "blocks.0.attn.head.1": "blocks.0.attn.hook_result"}
CALL: dict[str, Any] = {"points": ("mlp_out", "head"), "roles": ["all"], "batch_size": 5, "progress": False}


@torch.no_grad()
def _by_hand(recipient: HookedVLM, change, prompts, metric, component: str) -> float:
    """Mean effect of a component of the recipient with noise, moved into the recipient."""
    model = copy.deepcopy(recipient.model)
    for name, parameter in model.named_parameters():
        parameter.copy_(change(name, parameter))
    noisy, hook = HookedVLM(model, check=False), HOOKS[component]
    batch = collate(prompts)
    theirs = noisy.run_with_cache(batch.inputs, [hook])[1][hook]

    def put(activation, hook):
        index = (..., 1, slice(None)) if "head" in component else ...
        activation = activation.clone()
        activation[index] = theirs[index]
        return activation

    patched = recipient.run_with_hooks(batch.inputs, [(hook, put)]).logits
    return float((metric(patched, batch) - metric(recipient(batch.inputs).logits, batch)).mean())


def test_noise_pairs_are_recipients_with_noise_and_leave_the_models_alone() -> None:
    pair = made_pair("qwen2_5_vl")
    found = find_decisions(pair, examples("qwen2_5_vl"), "soft", **SETTINGS)
    before = [weights_sha256(vlm.model) for vlm in (pair.in_, pair.rl)]
    noise = noise_cells(pair, found, n_pairs=2, seed=4, **CALL)
    assert [weights_sha256(vlm.model) for vlm in (pair.in_, pair.rl)] == before
    assert noise["noise_direction"].values.tolist() == ["rl_to_in", "in_to_rl"]
    for number, (recipient, change) in enumerate(
        zip((pair.in_, pair.rl), random_changes(pair, [4, 5]), strict=True)
    ):
        for component in HOOKS:
            expected = _by_hand(recipient, change, found.prompts, found.metric, component)
            got = float(noise["noise_effect"].sel(noise_pair=number, reading="same", component=component)[0])
            assert got == pytest.approx(expected, abs=1e-5 * max(1, abs(expected)))
            assert abs(expected) > 1e-3


def test_infinite_values_of_either_sign_are_an_infinite_mean() -> None:
    """+inf and -inf together are no number, which would pass for a cell that no noise pair has."""
    effect = np.array([[1.0, 2.0, np.nan], [np.inf, -np.inf, 0.0], [np.nan, np.nan, np.nan]])
    cells = xr.Dataset(
        {"effect": (("direction", "component", "role", "example"), effect[None, :, None])},
        coords={"component": ["a", "b", "c"], "role": ["all"]},
    )
    found = _means({"same": cells})["means"][0, :, 0]
    np.testing.assert_array_equal(found, [1.5, np.inf, np.nan])


def test_a_noise_pairs_own_decisions_are_selected() -> None:
    """At its own first divergences the whole of a noise pair moves its own token up; the pair's tokens it does not."""
    pair = made_pair("qwen2_5_vl")
    found = find_decisions(pair, examples("qwen2_5_vl"), "first", **SETTINGS)
    call: dict[str, Any] = {**CALL, "points": ("resid_pre",)}
    noise = noise_cells(pair, found, ["rl_to_in"], n_pairs=3, **call)
    last = noise["noise_effect"].sel(component=f"blocks.{pair.in_.n_layers - 1}.hook_resid_pre", role="all")
    assert (last.sel(reading="own") > 0).all()
    assert (noise["noise_n"].sel(reading="own") <= len(found.in_traces)).all()


def test_the_random_pair_that_reaches_highest_is_given() -> None:
    pair = made_pair("qwen2_5_vl")
    found = find_decisions(pair, examples("qwen2_5_vl"), "soft", **SETTINGS)
    settings = {"batch_size": 5}
    single = [null_pair_denominator(pair, found, seed, n_draws=1, **settings) for seed in (3, 4, 5)]
    several = null_pair_denominator(pair, found, 3, n_draws=3, **settings)
    assert list(several) == list(single[0])
    for name in ("random", "random, own decisions"):
        each = [float(one[name].value) for one in single]  # too few examples for an interval
        assert float(several[name].value) == max(each) > min(each)
    with pytest.raises(FrankenlensError, match="n_draws is 0"):
        null_pair_denominator(pair, found, n_draws=0)


def test_what_cannot_be_asked_for_is_named() -> None:
    pair = made_pair("qwen2_5_vl")
    found = find_decisions(pair, examples("qwen2_5_vl")[:2], "soft", **SETTINGS)
    with pytest.raises(FrankenlensError, match="n_pairs is 0"):
        noise_cells(pair, found, n_pairs=0)
    with pytest.raises(FrankenlensError, match="n_random is 0"):
        component_map(pair, found, n_random=0, progress=False)
    with pytest.raises(FrankenlensError, match="'others' is no further control; choose of other, self"):
        component_map(pair, found, further=["others"])
    alone = component_map(pair, found, ["rl_to_in"], ["mlp_out"], ["all"], further=(), progress=False)
    assert alone["control_other"].isnull().all() and alone["control_random"].notnull().all()
    np.testing.assert_array_equal(alone["control_self"].isnull(), True)
