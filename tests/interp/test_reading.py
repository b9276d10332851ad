"""Metrics read some places at a time: gradients, metrics of a user's own, several at once; against all logits."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import batches
from interp.attention import attention_mass, attention_view
from interp.decision import find_decisions
from interp.map import attribute
from interp.metrics import AnswerLogProbability, Metric, Reading, Summed, TraceLogLikelihood, evaluate
from interp.metrics.logits import Logits, run_for_logits
from interp.pair.pair import Pair
from interp.paths import path_effects
from interp.prompts import Prompt, PromptBatch, collate
from interp.questions.tasks import sample
from interp.steering.directions import differences
from interp.sweep import Intervention, residual_map, sweep


@dataclass(frozen=True)
class Surprise:
    """A metric of a user's own, without `terms`: minus the log-probability of the trace."""

    name: str = "surprise"
    units: str = "nats"

    def __call__(
        self, logits: Float[Tensor, "batch pos vocab"], batch: PromptBatch
    ) -> Float[Tensor, " batch"]:
        ids, read = batch.inputs["input_ids"], self.reads(batch)[:, :-1]
        log_p = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -torch.where(read, log_p, 0.0).sum(1)

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        return TraceLogLikelihood().reads(batch)

    def select(self, rows) -> Surprise:
        return self


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """Three places at a time."""
    monkeypatch.setitem(batches.AT_ONCE, "cpu", 3 * pair.in_.n_logits)


def test_a_metric_of_ones_own_and_several_at_once_are_hugging_faces(pair: Pair, few: None) -> None:
    examples = sample("sum", 4, seed=0, split="map")
    prompts = [pair.builder.build(e, "<think> count red 2 </think> answer 2") for e in examples]
    assert isinstance(Surprise(), Metric) and not isinstance(Surprise(), Summed)
    batch = collate(prompts, "left")
    metrics = [TraceLogLikelihood(), Surprise(), AnswerLogProbability()]
    reading = Reading(metrics, batch)
    found = reading(run_for_logits(pair.in_, batch.inputs, reading.columns))
    expected = torch.zeros(3, len(prompts))
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            log_p = pair.in_.model(**prompt.inputs).logits[0].double().log_softmax(-1)
        for place in range(prompt.n_prompt_tokens, len(prompt)):
            one = float(log_p[place - 1, prompt.ids[place]])
            expected[:, row] += torch.tensor([one, -one, one * (prompt.roles[place] == "answer")])
    np.testing.assert_allclose(found.detach(), expected, rtol=0, atol=1e-4)
    assert expected.abs().min() > 0.01
    np.testing.assert_allclose(evaluate(pair.in_, prompts, Surprise()), expected[1], rtol=0, atol=1e-4)


def test_gradients_through_places_made_again_are_those_of_all_at_once(pair: Pair, few: None) -> None:
    prompts = [
        pair.builder.build(e, "<think> 1 2 3 4 </think>") for e in sample("sum", 2, seed=0, split="map")
    ]
    batch = collate(prompts)
    reading = Reading([TraceLogLikelihood()], batch)
    made = run_for_logits(pair.in_, batch.inputs)
    source = made.source.detach().requires_grad_()
    reading(Logits(source, made.columns, made.n_words, made.unembed)).sum().backward()
    again = made.source.detach().requires_grad_()
    log_p = pair.in_.unembed(again).log_softmax(-1)
    total = torch.zeros(())
    for row, prompt in enumerate(prompts):
        for place in range(prompt.n_prompt_tokens, len(prompt)):
            total = total + log_p[row, place - 1, prompt.ids[place]]
    total.backward()
    assert source.grad is not None and again.grad is not None
    largest = float(again.grad.abs().max())
    assert largest > 1e-2
    assert float((source.grad - again.grad).abs().max()) <= 1e-5 * max(1.0, largest)


def test_attribution_in_chunks_is_attribution(pair: Pair, request: pytest.FixtureRequest) -> None:
    decisions = find_decisions(pair, sample("sum", 3, seed=0, split="map"), "soft", max_new_tokens=24)
    settings = {"points": ("mlp_out",), "roles": ["all"], "progress": False}
    whole = attribute(pair, decisions, **settings)["effect"].to_numpy()
    request.getfixturevalue("few")
    found = attribute(pair, decisions, **settings)["effect"].to_numpy()
    size = np.nanmax(np.abs(whole))
    assert size > 1e-2
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * max(1.0, size))


PATH = "blocks.1.attn.head.0 -> blocks.3.mlp"


def _attention(pair: Pair, prompts: list[Prompt]) -> None:
    attention_mass(pair.in_, prompts, "reasoning", "image")
    attention_view(pair.in_, prompts[0], heads=[0])


def _donors(pair: Pair, prompts: list[Prompt]) -> None:
    site = "blocks.2.hook_mlp_out"
    kinds = [Intervention(site, kind) for kind in ("replace", "mean", "resample")]
    sweep(pair.in_, prompts, kinds, AnswerLogProbability(), donor=pair.rl, progress=False)


def _residual_map(pair: Pair, prompts: list[Prompt]) -> None:
    residual_map(pair.in_, prompts, AnswerLogProbability(), donor=pair.rl, progress=False)


def _directions(pair: Pair, prompts: list[Prompt]) -> None:
    differences(pair, prompts, "blocks.1.hook_resid_post")


def _paths(pair: Pair, prompts: list[Prompt]) -> None:
    path_effects(pair.in_, prompts, AnswerLogProbability(), [PATH], donor=pair.rl, progress=False)


@pytest.mark.parametrize(
    "run", [_attention, _donors, _residual_map, _directions, _paths], ids=lambda run: run.__name__
)
def test_who_wants_activations_makes_no_logits_of_all_tokens(pair: Pair, run: Any) -> None:
    """The unembedding is applied to no more than is read, or to a row's last token."""
    prompts = [
        pair.builder.build(e, "<think> 1 2 3 </think> answer 2")
        for e in sample("sum", 2, seed=0, split="map")
    ]
    most: list[int] = []
    with ExitStack() as stack:
        for vlm in pair.models.values():
            unembed = vlm.module(vlm.anatomy.unembed)
            handle = unembed.register_forward_hook(lambda m, a, out: most.append(out[..., 0].numel()))
            stack.callback(handle.remove)
        run(pair, prompts)
    assert most
    assert max(most) <= 16 < len(prompts[0])
