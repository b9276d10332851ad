"""Metrics and batches that are given what they were not made for: refused by name, never a number of something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Bool
from torch import Tensor

from hooks import FrankenlensError, batches
from interp.attention import attention_mass
from interp.decision.null_pairs import changed_weights
from interp.decision.traces import Head, trace_logits
from interp.lens import logit_lens
from interp.metrics import (
    AnswerLogProbability,
    LogitDifference,
    Metric,
    Reading,
    SoftDifference,
    TraceLogLikelihood,
    evaluate,
)
from interp.metrics.logits import run_for_logits
from interp.pair.generation import greedy
from interp.pair.pair import Pair
from interp.prompts import Prompt, PromptBatch, collate
from interp.prompts.batch import PaddingSide
from interp.questions.tasks import sample


@dataclass(frozen=True)
class Given:
    """A metric of a user's own."""

    value: Callable[[Tensor], Any]
    role: str = "decision"
    name: str = field(default="given", init=False)
    units: str = field(default="nats", init=False)

    def __call__(self, logits: Tensor, batch: PromptBatch) -> Any:
        return self.value(logits)

    def reads(self, batch: PromptBatch) -> Bool[Tensor, "batch pos"]:
        return batch.mask(self.role)

    def select(self, rows) -> Metric:
        return self


def _louder(name: str, weight: Tensor) -> Tensor:
    return 1.5 * weight


@pytest.fixture(scope="module")
def prompts(pair: Pair) -> list[Prompt]:
    """Of 33 and 36 tokens."""
    traces = ("<think> count red", "<think> count red 2 </think> answer 2")
    examples = sample("sum", 4, seed=0, split="map")
    return [pair.builder.build(e, traces[row % 2]) for row, e in enumerate(examples)]


@pytest.mark.parametrize(
    "value",
    [
        lambda logits: logits[:, -1, 0].mean(),
        lambda logits: logits[:1, -1, 0],
        lambda logits: logits[:, -1, :1],
        lambda logits: logits[:, -1, 0].tolist(),
    ],
    ids=["mean", "one", "column", "list"],
)
def test_what_is_no_number_for_each_prompt_is_refused(pair: Pair, prompts: list[Prompt], value) -> None:
    with pytest.raises(
        FrankenlensError, match=r"the value of the metric 'given' is .* must be a tensor \[4\]"
    ):
        evaluate(pair.in_, prompts, Given(value))


def test_values_in_half_precision_and_truths_are_numbers(pair: Pair, prompts: list[Prompt]) -> None:
    with torch.no_grad():
        last = torch.stack([pair.in_.model(**p.inputs).logits[0, -1, 3] for p in prompts])
    half = evaluate(pair.in_, prompts, Given(lambda logits: logits[:, -1, 3].bfloat16()))
    np.testing.assert_allclose(half, last, rtol=2**-8)
    signs = evaluate(pair.in_, prompts, Given(lambda logits: logits[:, -1, 3] > 0))
    assert signs.tolist() == (last > 0).double().tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", [-1, 33])
def test_a_position_off_the_prompt_is_refused(
    pair: Pair, prompts: list[Prompt], side: PaddingSide, place: int
) -> None:
    ids = torch.arange(4)
    metric = LogitDifference(ids + 9, ids, torch.tensor([place, 3, 3, 3]))
    batch = collate(prompts, side)
    with torch.no_grad():
        logits = pair.in_.model(**batch.inputs).logits
    assert batch.roles.shape[1] > 33  # there is padding that could be read
    with pytest.raises(FrankenlensError, match=rf"position {place} of prompt .* is none of its "):
        metric(logits, batch)


def test_ids_that_are_none_are_refused() -> None:
    for ids in ([3, -1], [-100, 3]):
        with pytest.raises(FrankenlensError, match="two token ids for each prompt, none below 0"):
            LogitDifference(torch.tensor([1, 2]), torch.tensor(ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_of_a_trace_that_is_not_there_are_refused(
    pair: Pair, prompts: list[Prompt], side: PaddingSide
) -> None:
    weights = tuple(torch.randn(len(p.trace_ids), pair.in_.n_logits) for p in prompts)
    soft = SoftDifference(weights, torch.tensor([p.n_prompt_tokens - 1 for p in prompts]))
    cut = [prompts[0].truncated(prompts[0].n_prompt_tokens + 1), *prompts[1:]]
    batch = collate(cut, side)
    with pytest.raises(FrankenlensError, match=r"the soft difference's step at position \d+ of prompt"):
        soft(torch.zeros(*batch.roles.shape, pair.in_.n_logits), batch)


def test_a_mask_names_no_rows(pair: Pair, prompts: list[Prompt]) -> None:
    ids = torch.arange(4)
    metric = LogitDifference(ids, ids + 9)
    soft = SoftDifference(tuple(torch.zeros(1, 5) for _ in prompts), ids)
    for mask in (torch.tensor([True, False, True, True]), np.array([True, False]), [True, False]):
        for select in (metric.select, soft.select, collate(prompts).select):
            with pytest.raises(FrankenlensError, match=r"rows are chosen by their numbers.*mask\.nonzero"):
                select(mask)  # type: ignore[operator]
    for rows in (torch.tensor([-1, 2, 2]), np.array([-1, 2, 2]), (-1, 2, 2)):
        assert metric.select(rows).a.tolist() == [3, 2, 2]  # type: ignore[arg-type]


def test_some_places_may_be_those_of_one_metric_alone(
    pair: Pair, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tuple(torch.randn(len(p.trace_ids), pair.in_.n_logits) for p in prompts)
    soft = SoftDifference(weights, torch.tensor([p.n_prompt_tokens - 1 for p in prompts]))
    batch, ids = collate(prompts, "left"), torch.arange(4)
    reading = Reading([soft, LogitDifference(ids, ids + 1)], batch)
    expected = torch.zeros(2, len(prompts))
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            logits = pair.in_.model(**prompt.inputs).logits[0]
            steps = logits[prompt.n_prompt_tokens - 1 : -1]
            expected[:, row] = torch.stack(
                [(steps * weights[row]).sum(), logits[-1, row] - logits[-1, row + 1]]
            )
        monkeypatch.setitem(batches.AT_ONCE, "cpu", pair.in_.n_logits)  # one place at a time
        found = reading(run_for_logits(pair.in_, batch.inputs, reading.columns))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max().clamp(min=1)))


def test_a_batch_of_which_nothing_is_read(pair: Pair) -> None:
    bare = [pair.builder.build(e) for e in sample("sum", 2, seed=0, split="map")]
    assert evaluate(pair.in_, bare, TraceLogLikelihood()).tolist() == [0.0, 0.0]
    assert np.isnan(evaluate(pair.in_, bare, AnswerLogProbability())).all()
    own = Given(lambda logits: torch.zeros(len(logits)), role="answer")
    assert evaluate(pair.in_, bare, own).tolist() == [0.0, 0.0]


def test_logits_are_made_of_the_weights_that_ran_though_another_thread_changes_them(
    pair: Pair, prompts: list[Prompt]
) -> None:
    vlm, batch = pair.in_, collate(prompts, "left")
    reading = Reading([TraceLogLikelihood()], batch)
    with torch.no_grad():
        logits = run_for_logits(vlm, batch.inputs, reading.columns)
        expected = reading(logits)
        (_, steps), *_ = trace_logits(vlm, prompts, 4)
        first = steps[:1].clone()
        with changed_weights(vlm.model, _louder):
            assert float((reading(logits) - expected).abs().max()) > 1  # what is guarded against
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with changed_weights(vlm.model, _louder):
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    threading.Timer(0.3, leave.set).start()
    with torch.no_grad():
        found = reading(logits)
    assert leave.is_set()
    thread.join()
    assert torch.equal(found, expected)
    assert torch.equal(steps[:1], first)


@torch.no_grad()
def test_hooks_of_its_owner_on_the_unembedding_are_in_its_copy(pair: Pair) -> None:
    vlm = pair.in_
    head, normed = vlm.model.get_submodule(vlm.anatomy.unembed), torch.randn(3, vlm.d_model)
    gain = torch.rand(vlm.n_logits) + 0.5

    def louder(module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * gain

    handle = head.register_forward_hook(louder)
    try:
        kept, expected = Head(vlm), vlm.unembed(normed).detach()
        with changed_weights(vlm.model, _louder):
            found = kept(normed)
            assert float((vlm.unembed(normed) - expected).abs().max()) > 0.1
    finally:
        handle.remove()
    assert torch.equal(found, expected)
    assert float((vlm.unembed(normed) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_nothing_are_refused(pair: Pair, prompts: list[Prompt], size: int) -> None:
    for run in (
        lambda: evaluate(pair.in_, prompts, TraceLogLikelihood(), batch_size=size),
        lambda: greedy(pair.in_, prompts, 2, batch_size=size),
        lambda: attention_mass(pair.in_, prompts, "decision", "image", batch_size=size),
        lambda: logit_lens(pair.in_, prompts, where="decision", batch_size=size, progress=False),
    ):
        with pytest.raises(FrankenlensError, match=f"batch_size is {size}; it must be at least 1"):
            run()
