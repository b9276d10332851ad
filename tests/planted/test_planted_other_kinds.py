"""Exact patching finds what was planted in a mixture of experts and behind post-norms, as in the embedded pair.

The embedded pair's bar is 0.9 (`test_planted_pairs`). Its changes are RL's own; here they are random, 5 % of every
tensor, in models with random weights, with noise of rounding size in all other weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hooks import FrankenlensError, HookedVLM
from interp.decision import find_decisions
from interp.pair.pair import Pair
from interp.planting import (
    METHODS,
    WITH_EXPERTS,
    Draws,
    Plant,
    Subject,
    candidates,
    planted,
    told_apart,
    truth,
)
from interp.planting.table import auroc
from interp.questions.tasks import REASONING, sample
from tests import other_kinds


def scores(pair_of: Callable[[], tuple[HookedVLM, HookedVLM]], kind: str, n: int) -> list[float]:
    """AUROC of exact patching, a pair each."""
    in_, donor = pair_of()
    draws, found = Draws(in_, donor), []
    for i in range(n):
        plant = draws.plant(kind, i)
        pair = Pair(in_, planted(in_, donor, plant))
        drawn = [e for task in REASONING for e in sample(task, 1, seed=plant.seed, split="map")]
        decisions = find_decisions(pair, drawn, "soft", max_new_tokens=24, progress=False)
        among = told_apart(candidates(in_, WITH_EXPERTS), plant)
        effects = METHODS["patch RL → IN"].run(Subject(pair, decisions, among))
        found.append(auroc(np.abs(effects.mean(axis=1)), truth(among, plant).numpy()))
        pair.rl.close()
    return found


@pytest.mark.filterwarnings(
    "ignore:.*cannot be taken up at a stored token:UserWarning"
)  # post-norms: the longer way
@pytest.mark.parametrize(("model", "kind"), [("experts", "experts"), ("experts", "rl"), ("post_norms", "rl")])
@pytest.mark.parametrize(("n", "bar"), [(3, 0.85), pytest.param(40, 0.9, marks=pytest.mark.slow)])
def test_exact_patching_finds_what_was_planted(model: str, kind: str, n: int, bar: float) -> None:
    found = scores(getattr(other_kinds, model), kind, n)
    assert np.mean(found) >= bar, found


def test_an_mlp_of_which_one_expert_changed_is_neither_changed_nor_left_alone() -> None:
    in_, donor = other_kinds.experts()
    among = candidates(in_, WITH_EXPERTS)
    plant = Plant(("blocks.2.mlp.expert.1",))
    names = {component.name for component in told_apart(among, plant)}
    assert {component.name for component in among} - names == {"blocks.2.mlp"}
    assert plant.holds("blocks.2.mlp.expert.1")
    assert not plant.holds("blocks.2.mlp.expert.2")
    whole = Plant(("blocks.2.mlp",))
    assert whole.holds("blocks.2.mlp.expert.3")
    assert told_apart(among, whole) == among
    changed = planted(in_, donor, Plant(("blocks.2.mlp.expert.1",), noise="none"))
    for name, parameter in changed.model.named_parameters():
        own = in_.model.get_parameter(name)
        if "layers.2.mlp.experts" in name:
            assert (parameter != own).flatten(1).any(1).tolist() == [False, True, False, False]
        else:
            assert (parameter == own).all(), name


def test_pairs_of_experts_need_experts() -> None:
    in_, donor = other_kinds.post_norms()
    with pytest.raises(FrankenlensError, match="has no experts"):
        Draws(in_, donor).plant("experts", 0)
