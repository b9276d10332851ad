"""One head of the embedded IN is replaced by a perturbed copy of equal norm: does the map point at it?"""

import copy
import random

import numpy as np
import pytest
import torch

from experiments import embedded
from hooks import HookedVLM, weight_slices
from interp.decision import find_decisions
from interp.map.component_map import component_map
from interp.map.summary import strongest, summarise
from interp.pair.pair import Pair
from interp.planting import Subject, candidates
from interp.questions.tasks import REASONING, sample

N_PROMPTS, TOP = 8, 3


def planted(vlm: HookedVLM, layer: int, head: int, seed: int) -> HookedVLM:
    """A copy in which W_Q (with b_Q) and W_O of one head are rotated away from their own, at their own norm."""
    model = copy.deepcopy(vlm.model)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for piece in weight_slices(model, vlm.anatomy, f"blocks.{layer}.attn.head.{head}"):
            view = piece.of(parameters[piece.parameter])
            new = view + view.std(correction=0) * torch.randn(view.shape, generator=generator)
            view.copy_(new * (view.norm() / new.norm()))
    return HookedVLM(model, vlm.processor, check=False)


@pytest.fixture(scope="module")
def in_() -> HookedVLM:
    return HookedVLM.from_pretrained(embedded.path("in"))


@pytest.mark.parametrize("n", [pytest.param(n, marks=pytest.mark.slow) for n in (8, 24)])
def test_the_planted_head_is_among_the_top_three(in_: HookedVLM, n: int) -> None:
    """All but one of 24."""
    examples = [e for task in REASONING for e in sample(task, N_PROMPTS // len(REASONING), 0, "map")]
    everywhere = [(layer, head) for layer in range(in_.n_layers) for head in range(in_.n_heads)]
    plants = random.Random(0).sample(everywhere, n)
    points = ("attn_out", "mlp_out", "head")
    among = candidates(in_, points)
    missed = []
    for seed, (layer, head) in enumerate(plants):
        pair = Pair(in_, planted(in_, layer, head, seed))
        decisions = find_decisions(pair, examples, "soft", max_new_tokens=24, progress=False)
        effects = Subject(pair, decisions, among).patched("rl_to_in", False)
        order = np.argsort(-effects.sum(axis=1))[:TOP]
        top = [among[i].name for i in order]
        if seed == 0:  # the same three as of the map itself
            found = component_map(pair, decisions, ["rl_to_in"], points, ["all"], progress=False)
            table = strongest(summarise(found), "rl_to_in", TOP)
            assert table["component"].tolist() == top
        if f"blocks.{layer}.attn.head.{head}" not in top:
            missed.append(((layer, head), top))
    assert len(missed) <= n // 24, missed
