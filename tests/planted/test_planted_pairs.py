"""Do the methods find what was planted, with plain hooks' numbers, and claim nothing where nothing is?"""

from typing import Any

import numpy as np
import pytest
import torch

from experiments import embedded
from experiments.planted import FIRST, Garden, PlantedConfig
from hooks import FrankenlensError, HookedVLM
from interp.decision import find_decisions
from interp.pair import Pair
from interp.planting import (
    EVERYWHERE,
    METHODS,
    Plant,
    Subject,
    candidates,
    chosen,
    planted,
    trial,
)
from interp.planting.table import auroc
from interp.tasks import REASONING, sample

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


def test_nothing_is_claimed_on_an_identical_pair_nor_moved_on_noise(opened, examples) -> None:
    among = candidates(opened.in_)
    methods = chosen(["patch, both ways", "attribution RL → IN", "graft RL → IN", "skip", "knockout"])
    for noise in ("none", "bf16", "gaussian"):
        found = trial(opened.in_, opened.rl, Plant(noise=noise), examples, methods, among)
        assert not found["changed"].any()
        moving = found.loc[found["method"].str.contains("→|both")]
        assert (moving["refused"] != "").all()
        if noise == "none":
            assert (found["score"].dropna() == 0).all()
            assert (found["p_corrected"].dropna() == 1).all()


def test_exact_patching_finds_three_of_rls_components_among_noise(opened) -> None:
    """The bar: 50 pairs, every other weight with noise of rounding size; invisible plants are counted like others."""
    garden = Garden(opened, PlantedConfig())
    found = []
    for i in range(50):
        plant, among = garden.plant(FIRST, i)
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
