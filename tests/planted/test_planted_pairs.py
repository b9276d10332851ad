"""Do the methods find what was planted, with plain hooks' numbers, and claim nothing where nothing is?"""

from typing import Any

import numpy as np
import pytest
import torch

from experiments import embedded
from hooks import FrankenlensError, HookedVLM
from interp.decision import find_decisions, null_pair_denominator, recovery_refused
from interp.pair.pair import Pair
from interp.planting import (
    EVERYWHERE,
    METHODS,
    Draws,
    Plant,
    Subject,
    candidates,
    chosen,
    claims_possible,
    planted,
    trial,
)
from interp.planting.table import auroc
from interp.questions.tasks import REASONING, sample

CHANGED = ("blocks.3.mlp", "blocks.0.attn.head.0")


@pytest.fixture(scope="module")
def opened():
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def examples():
    return [example for task in REASONING for example in sample(task, 1, seed=5, split="map")]


@pytest.fixture(scope="module")
def subject(opened, examples) -> Subject:
    pair = Pair(opened.in_, planted(opened.in_, opened.rl, Plant(CHANGED)))
    decisions = find_decisions(pair, examples, "soft", max_new_tokens=24, progress=False)
    return Subject(pair, decisions, candidates(opened.in_, EVERYWHERE), 3)


@torch.no_grad()
def _run(subject: Subject, vlm: HookedVLM, row: int, hooks=()) -> float:
    """The metric of one prompt alone, under hooks."""
    metric: Any = subject.decisions.metric.select([row])
    prompt = subject.decisions.prompts[row]
    logits = vlm.run_with_hooks(prompt.inputs, fwd_hooks=list(hooks)).logits[0]
    start = int(metric.start[0])
    steps = logits[start : start + len(metric.weights[0])].float()
    return float((steps * metric.weights[0]).sum())


def _check(found: np.ndarray, subject: Subject, name: str, expected: list[float], of: float = 1.0) -> None:
    place = [component.name for component in subject.wanted].index(name)
    tolerance = 1e-5 * max(1.0, of)
    assert np.abs(found[place] - expected).max() < tolerance
    assert np.abs(expected).max() > 100 * tolerance


def test_patches_are_those_of_plain_hooks(subject) -> None:
    in_, rl = subject.pair.in_, subject.pair.rl
    places = [
        ("patch RL → IN", "blocks.3.mlp", "blocks.3.hook_mlp_out", ...),
        ("patch IN → RL", "blocks.0.attn.head.0", "blocks.0.attn.hook_result", (..., 0, slice(None))),
        ("patch z RL → IN", "blocks.0.attn.head.0", "blocks.0.attn.hook_z", (..., 0, slice(None))),
        ("patch z IN → RL", "blocks.3.mlp", "blocks.3.mlp.hook_post", ...),
        ("patch RL → IN", "projector", "projector.hook_out", ...),
    ]
    for method, name, hook, index in places:
        recipient, donor = (in_, rl) if method.endswith("IN") else (rl, in_)
        expected = []
        for row, prompt in enumerate(subject.decisions.prompts):
            _, cache = donor.run_with_cache(prompt.inputs, [hook])

            def put(activation, hook, cache=cache, index=index):
                activation[index] = cache[hook.name][index]
                return activation

            expected.append(_run(subject, recipient, row, [(hook, put)]) - _run(subject, recipient, row))
        found = METHODS[method].run(subject)
        if name == "projector":  # noise alone, so nothing to speak of
            place = [component.name for component in subject.wanted].index(name)
            assert np.abs(found[place] - expected).max() < 1e-5
        else:
            _check(found, subject, name, expected)


def test_skips_and_cuts_are_differences_of_plain_hooks(subject) -> None:
    def zero(activation, hook):
        return torch.zeros_like(activation)

    def changes(hooks_of) -> list[float]:
        found = []
        for row, prompt in enumerate(subject.decisions.prompts):
            own = []
            for vlm in (subject.pair.in_, subject.pair.rl):
                own.append(_run(subject, vlm, row, hooks_of(prompt)) - _run(subject, vlm, row))
            found.append(own[1] - own[0])
        return found

    _check(
        METHODS["skip"].run(subject),
        subject,
        "blocks.3.mlp",
        changes(lambda _: [("blocks.3.hook_mlp_out", zero)]),
    )

    def cut(prompt):
        image = torch.tensor([role == "image" for role in prompt.roles])

        def hook(scores, hook):
            scores[:, 0, :, image] = -torch.inf
            return scores

        return [("blocks.0.attn.hook_attn_scores", hook)]

    _check(METHODS["knockout"].run(subject), subject, "blocks.0.attn.head.0", changes(cut))


def test_grafts_are_state_dicts_put_together_by_hand(subject) -> None:
    in_, rl = subject.pair.in_.model, subject.pair.rl.model
    path = subject.pair.in_.anatomy.text.blocks[3].mlp + "."
    own = {name: tensor.clone() for name, tensor in in_.state_dict().items()}
    mixed = {n: rl.state_dict()[n] if n.startswith(path) else tensor for n, tensor in own.items()}
    rows = range(len(subject.decisions))
    clean = [_run(subject, subject.pair.in_, row) for row in rows]
    in_.load_state_dict(mixed)
    moved = [_run(subject, subject.pair.in_, row) for row in rows]
    in_.load_state_dict(own)
    found = METHODS["graft RL → IN"].run(subject)
    _check(found, subject, "blocks.3.mlp", [a - b for a, b in zip(moved, clean, strict=True)])


def test_a_method_says_nothing_of_what_it_cannot_reach(subject) -> None:
    kinds = np.array([component.point for component in subject.wanted])
    blind = {"attribution RL → IN": ("vision", "projector"), "knockout": ("mlp_out", "vision", "projector")}
    for name, points in blind.items():
        silent = np.isnan(METHODS[name].run(subject)).all(axis=1)
        np.testing.assert_array_equal(silent, np.isin(kinds, points))


def _prompts(seed: int):
    """As many as a claim takes."""
    return [example for task in REASONING for example in sample(task, 3, seed=seed, split="map")]


def test_nothing_is_claimed_on_an_identical_pair_and_something_on_a_planted_one(opened) -> None:
    among, methods = candidates(opened.in_), chosen(["patch RL → IN", "attribution RL → IN"])
    same = trial(opened.in_, opened.rl, Plant(noise="none"), _prompts(6), methods, among)
    assert not same["changed"].any() and (same["refused"] != "").all()
    assert (same["score"] == 0).all() and (same["p_corrected"] == 1).all()
    plant = Plant(("blocks.0.mlp", "blocks.3.mlp"))
    found = trial(opened.in_, opened.rl, plant, _prompts(6), methods, among)
    assert found["changed"].sum() == 2 * 2 and (found["refused"] == "").all()
    assert (found.loc[found["component"] == "blocks.3.mlp", "p_corrected"] < 0.05).all()


def test_recoveries_of_noise_are_refused_all_but_always(opened) -> None:
    """The rule compares with one random draw, so that it errs now and then; the README has the rate."""
    refused = []
    for seed in (6, 7, 8):
        for noise in ("bf16", "gaussian"):
            pair = Pair(opened.in_, planted(opened.in_, opened.rl, Plant(noise=noise)))
            decisions = find_decisions(pair, _prompts(seed), "soft", max_new_tokens=24, progress=False)
            refused.append(recovery_refused(decisions, null_pair_denominator(pair, decisions)))
            pair.rl.close()
    assert sum("learnt nothing" in reason for reason in refused) >= 5, refused


def test_too_few_prompts_for_a_claim_give_no_p_at_all(opened, examples) -> None:
    assert [claims_possible(45, n) for n in (10, 11)] == [False, True]  # 45 x 2 / 2^n < 0.05
    assert not claims_possible(1, 7)
    among = candidates(opened.in_)
    few = trial(opened.in_, opened.rl, Plant(CHANGED), examples, chosen(["patch RL → IN"]), among)
    assert few["p"].isna().all() and few["score"].notna().all()


def test_prompts_without_an_image_silence_no_method(subject) -> None:
    from interp.planting.trial import _scored

    effects = METHODS["patch RL → IN"].run(subject)
    holed = effects.copy()
    holed[0, 0] = np.nan
    assert _scored(holed, False)["effect"][0] == pytest.approx(effects[0, 1:].mean())
    assert np.isnan(_scored(np.full((1, 3), np.nan), True)["score"][0])


def test_plants_that_no_candidate_holds_are_refused(opened, examples) -> None:
    methods, among = chosen(["compare"]), candidates(opened.in_)
    for address in ("projector", "blocks.3.mlp.neuron.5", "embed"):
        with pytest.raises(FrankenlensError, match="none of the 45 components"):
            trial(opened.in_, opened.rl, Plant((address,)), examples, methods, among)


@pytest.mark.parametrize("n", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_exact_patching_finds_three_of_rls_components_among_noise(opened, n) -> None:
    """The bar, on 50 pairs: every other weight has noise of rounding size; invisible plants are counted like others."""
    draws = Draws(opened.in_, opened.rl)
    found = []
    for i in range(n):
        plant, among = draws.plant("rl", i), draws.among("rl")
        assert len(plant.components) == 3
        assert plant.noise == "gaussian"
        pair = Pair(opened.in_, planted(opened.in_, opened.rl, plant))
        drawn = [e for task in REASONING for e in sample(task, 1, seed=plant.seed, split="map")]
        decisions = find_decisions(pair, drawn, "soft", max_new_tokens=24, progress=False)
        effects = METHODS["patch RL → IN"].run(Subject(pair, decisions, among))
        changed = np.array([plant.holds(component.name) for component in among])
        found.append(auroc(np.abs(effects.mean(axis=1)), changed))
        pair.rl.close()
    assert np.mean(found) >= 0.9, found


def test_an_unknown_method_is_named(opened) -> None:
    with pytest.raises(FrankenlensError, match="Did you mean 'knockout'"):
        chosen(["knokout"])
    with pytest.raises(FrankenlensError, match="no method is named"):
        chosen([])
