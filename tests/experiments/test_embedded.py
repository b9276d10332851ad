"""The triple that ships: it loads, it is small, and it answers as well as its table says."""

from __future__ import annotations

import math

import pytest

from experiments import embedded
from experiments.triple import checkpoints, evaluate
from experiments.triple.replies import greedy_replies
from interp.questions.tasks import PERCEPTION, REASONING

MEGABYTE = 10**6


@pytest.mark.parametrize("stage", embedded.STAGES)
def test_each_stage_is_small_and_complete(stage: embedded.Stage):
    folder = embedded.path(stage)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * MEGABYTE
    names = {file.name for file in folder.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "processor_config.json",
        "chat_template.jinja",
    } <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


@pytest.mark.parametrize("stage", ["in", "rl"])
def test_accuracy_measured_again_agrees_with_the_table(stage: embedded.Stage):
    model, processor = checkpoints.load(embedded.path(stage))
    examples = evaluate.test_examples(25, "test", seed=77)
    score, _ = evaluate.score(greedy_replies(model, processor, examples), examples)
    said = embedded.results()["models"]["rl-0" if stage == "rl" else stage]
    for group, tasks in (("perception", PERCEPTION), ("reasoning", REASONING)):
        variance = sum(said["accuracy"][task] * (1 - said["accuracy"][task]) / 25 for task in tasks)
        error = math.sqrt(variance) / len(tasks)
        assert abs(getattr(score, group) - said[group]) < 4 * error + 0.01
    assert score.chain_rate >= 0.95


def test_base_answers_without_a_chain():
    model, processor = checkpoints.load(embedded.path("base"))
    examples = evaluate.test_examples(3, "test", seed=78)[: 3 * len(PERCEPTION)]
    replies = greedy_replies(model, processor, examples)
    assert all(reply.chain is None and reply.answer is not None for reply in replies)


@pytest.mark.parametrize("stage", embedded.STAGES)
def test_the_table_is_of_the_weights_that_ship(stage: embedded.Stage):
    measured = embedded.results()["models"]["rl-0" if stage == "rl" else stage]
    assert measured["weights"] == evaluate.weights_hash(embedded.path(stage))


def test_all_stages_have_the_same_tokenizer_processor_and_template():
    small = (
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "config.json",
    )
    for name in small:
        assert len({(embedded.path(stage) / name).read_bytes() for stage in embedded.STAGES}) == 1, name
