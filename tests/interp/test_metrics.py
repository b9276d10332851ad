"""Metrics against closed forms, with any padding."""

import math

import pytest
import torch

from hooks.errors import FrankenlensError
from interp.metrics import (
    AnswerLogProbability,
    KLToReference,
    LogitDifference,
    Metric,
    SoftDifference,
    TraceLogLikelihood,
)
from interp.prompts import PromptBuilder, collate
from interp.questions.examples import Example
from tests.families import tiny_processor

TRACES = ("<think> red 3 </think> answer 5 6 <|im_end|>", "1 2", None)
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(scope="module")
def prompts():
    builder = PromptBuilder(tiny_processor("llava"))
    return [
        builder.build(Example(str(i), (), f"what is {'the ' * i}star", "5"), t) for i, t in enumerate(TRACES)
    ]


def uniform_but(batch, boosts):
    """Logits of 0 everywhere, except boosts {(row, token index, token id): value}."""
    logits = torch.zeros(*batch.roles.shape, 85)
    for (row, index, token), value in boosts.items():
        column = index + (
            batch.roles.shape[1] - int(batch.lengths[row]) if batch.padding_side == "left" else 0
        )
        logits[row, column, token] = value
    return logits


@SIDES
def test_logit_difference_at_the_last_token_and_elsewhere(prompts, side):
    batch = collate(prompts, side)
    last = [len(p) - 1 for p in prompts]
    boosts = {(0, last[0], 4): 2.0, (1, last[1], 5): 3.0, (2, last[2], 4): 1.0, (1, 3, 4): 7.0}
    logits = uniform_but(batch, boosts)
    a, b = torch.tensor([4, 4, 4]), torch.tensor([5, 5, 5])
    assert LogitDifference(a, b)(logits, batch).tolist() == [2.0, -3.0, 1.0]
    placed = LogitDifference(a, b, torch.tensor([0, 3, last[2]]))
    assert placed(logits, batch).tolist() == [0.0, 7.0, 1.0]
    some = placed.select([2, 1])
    assert some(logits[[2, 1]], collate_same(batch, [2, 1])).tolist() == [1.0, 7.0]


def collate_same(batch, rows):
    """Rows of a batch without padding them anew, so that logits of the whole batch still fit."""
    from dataclasses import replace

    return replace(
        batch,
        prompts=tuple(batch.prompts[row] for row in rows),
        roles=batch.roles[rows],
        lengths=batch.lengths[rows],
        inputs={name: tensor[rows] for name, tensor in batch.inputs.items()},
    )


@SIDES
def test_soft_difference_is_the_weighted_sum_over_the_trace(prompts, side):
    batch = collate(prompts[:2], side)
    start = torch.tensor([p.n_prompt_tokens - 1 for p in prompts[:2]])
    weights = tuple(torch.zeros(len(p.trace_ids), 85) for p in prompts[:2])
    weights[0][1, 7], weights[0][1, 8] = 0.5, -0.5
    weights[1][0, 3], weights[1][1, 3] = 0.25, 1.0
    boosts = {(0, int(start[0]) + 1, 7): 6.0, (0, int(start[0]) + 1, 8): 2.0, (0, int(start[0]), 7): 50.0}
    boosts |= {(1, int(start[1]), 3): 4.0, (1, int(start[1]) + 1, 3): 10.0}
    metric = SoftDifference(weights, start)
    logits = uniform_but(batch, boosts)
    assert metric(logits, batch).tolist() == [2.0, 11.0]
    assert metric.select([1])(logits[[1]], collate_same(batch, [1])).tolist() == [11.0]


@SIDES
def test_log_likelihood_of_trace_and_answer(prompts, side):
    batch = collate(prompts, side)
    first, ids = prompts[0].n_prompt_tokens, prompts[0].ids
    answer = [i for i, role in enumerate(prompts[0].roles) if role == "answer"]
    assert len(answer) == 2
    # a boost of ln 84 gives the written token probability 1/2, since 84 others have weight 1
    logits = uniform_but(batch, {(0, i - 1, ids[i]): math.log(84) for i in answer})
    uniform = math.log(85)
    expected = [-2 * math.log(2) - (len(ids) - first - 2) * uniform, -2 * uniform, 0.0]
    assert TraceLogLikelihood()(logits, batch).tolist() == pytest.approx(expected, rel=1e-5)
    values = AnswerLogProbability()(logits, batch)
    assert float(values[0]) == pytest.approx(-2 * math.log(2), rel=1e-5)
    assert values[1:].isnan().all()


@SIDES
def test_kl_to_a_reference(prompts, side):
    batch = collate(prompts, side)
    last = [len(p) - 1 for p in prompts]
    reference = uniform_but(batch, {(0, last[0], 1): math.log(84)})
    metric = KLToReference.from_logits(reference, batch)
    # P = (1/2, 84 x 1/168) against uniform over 85
    expected = 0.5 * math.log(85 / 2) + 0.5 * math.log(85 / 168)
    assert metric(torch.zeros_like(reference), batch).tolist() == pytest.approx([expected, 0, 0], abs=1e-5)
    assert metric(reference + 3.0, batch).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert metric.select([1, 0]).reference.shape == (2, 85)


def test_metrics_share_one_face_and_refuse_another_number_of_prompts(prompts):
    ids = torch.tensor([1, 2])
    metrics = [
        LogitDifference(ids, ids),
        SoftDifference((torch.zeros(1, 85),) * 2, ids),
        TraceLogLikelihood(),
        AnswerLogProbability(),
        KLToReference(torch.zeros(2, 85)),
    ]
    assert all(isinstance(metric, Metric) and metric.units == "nats" for metric in metrics)
    assert len({metric.name for metric in metrics}) == len(metrics)
    batch = collate(prompts)
    for metric in (metrics[0], metrics[1], metrics[4]):
        with pytest.raises(FrankenlensError, match="was made for 2 prompts, the batch has 3"):
            metric(torch.zeros(*batch.roles.shape, 85), batch)
