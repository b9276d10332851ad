"""Donors put together by hand do what they are said to, by plain logits."""

from dataclasses import replace

import pytest
import torch

from interp.pair import greedy
from interp.planting import Draws, Plant, planted, wired
from interp.prompts import collate
from interp.questions.tasks import REASONING, sample

pytestmark = pytest.mark.slow  # each opens and copies the embedded pair


@pytest.fixture(scope="module")
def prompts(pair):
    return [pair.builder.build(one) for task in REASONING for one in sample(task, 1, seed=3, split="map")]


@torch.no_grad()
def _apart(pair, donor, plant: Plant, prompts) -> float:
    """Total variation of next-token probabilities, mean over real tokens."""
    changed = planted(pair.in_, donor, plant)
    batch = collate(prompts)
    p, q = (vlm.model(**batch.inputs).logits.softmax(-1) for vlm in (pair.in_, changed))
    changed.close()
    return float((p - q).abs().sum(-1)[batch.mask("all")].mean()) / 2


def _sizes(pair, prompts, kind: str) -> tuple[float, list[float]]:
    """Of all components together, and of each alone."""
    plant = replace(Draws(pair.in_, pair.rl).plant(kind, 0), noise="none")
    donor = wired(pair.in_, pair.rl, kind, plant.components, prompts, plant.seed)
    alone = [_apart(pair, donor, replace(plant, components=(name,)), prompts) for name in plant.components]
    together = _apart(pair, donor, plant, prompts)
    donor.close()
    return together, alone


def test_two_that_act_only_together(pair, prompts) -> None:
    together, alone = _sizes(pair, prompts, "joint")
    assert together > 5 * max(alone) and together > 0.02


@pytest.mark.parametrize("i", range(4))
def test_a_backup_takes_over(pair, prompts, i: int) -> None:
    """In a donor that has both, along its own text, taking either away does little, and taking both away does much."""
    plant = replace(Draws(pair.in_, pair.rl).plant("backup", i), noise="none")
    seen = [pair.builder.build(one) for task in REASONING for one in sample(task, 12, seed=4, split="map")]
    text = greedy(pair.in_, seen, 24, 32)
    seen = [prompt.with_tokens(ids) for prompt, ids in zip(seen, text, strict=True)]
    donor = wired(pair.in_, pair.rl, "backup", plant.components, seen, plant.seed)
    text = greedy(donor, prompts, 24, 32)
    batch = collate([prompt.with_tokens(ids) for prompt, ids in zip(prompts, text, strict=True)])

    @torch.no_grad()
    def next_tokens(*components: str) -> torch.Tensor:
        changed = planted(pair.in_, donor, replace(plant, components=components))
        logits = changed.model(**batch.inputs).logits[batch.mask("all")]
        changed.close()
        return logits.softmax(-1)

    first, second = plant.components
    whole = next_tokens(first, second)
    without = [next_tokens(second), next_tokens(first), next_tokens()]
    *one_gone, both_gone = [float((whole - probs).abs().sum(-1).mean()) / 2 for probs in without]
    donor.close()
    assert both_gone > 0.1 and both_gone > 3 * max(one_gone)


def test_changes_that_cancel(pair, prompts) -> None:
    together, alone = _sizes(pair, prompts, "cancelling")
    assert together < 1e-5 and max(alone) > 100 * 1e-5


def test_queries_and_keys_alone(pair) -> None:
    """All that differs from IN is rows of W_Q, W_K and their biases, and these are RL's."""
    plant = Draws(pair.in_, pair.rl).plant("query-key", 0)
    donor = wired(pair.in_, pair.rl, "query-key", plant.components, [], plant.seed)
    own, new, theirs = (dict(vlm.model.named_parameters()) for vlm in (pair.in_, donor, pair.rl))
    moved = [name for name in own if not torch.equal(own[name], new[name])]
    assert moved and all(".q_proj." in name or ".k_proj." in name for name in moved)
    for name in moved:
        rows = (own[name] != new[name]).reshape(len(own[name]), -1).any(1)
        assert torch.equal(new[name][rows], theirs[name][rows])
    donor.close()
