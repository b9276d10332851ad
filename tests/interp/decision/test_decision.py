"""Decisions against brute force on plain Hugging Face models: one prompt at a time, no cache, no padding."""

import dataclasses
import json
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy import stats

from experiments import embedded
from hooks import HookedVLM
from hooks.errors import FrankenlensError
from interp.decision import (
    DecisionSet,
    changed_weights,
    find_decisions,
    null_changes,
    null_pair_denominator,
    recovery_refused,
    two_by_two,
)
from interp.decision.null_pairs import Null, RandomUpdate
from interp.map import attribute, component_map
from interp.metrics import KLToReference, TraceLogLikelihood, evaluate
from interp.pair.generation import greedy
from interp.pair.pair import Pair, weights_sha256
from interp.paths.pair import pair_paths
from interp.prompts import collate
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.questions.grading import Ungraded, grade
from interp.questions.tasks import sample
from interp.statistics import Interval, mean_interval
from tests.families import EACH_KIND, tiny
from tests.half_pairs import HALVES, half_pair

BUDGET = 7
SEEDS = {"idefics3": 5}  # with seed 3 it ends every turn at once, and so does its noisy copy
FREE = TraceFormat(reasoning=None, answer=None)  # all that a random model says is its answer
SETTINGS: dict[str, Any] = {"max_new_tokens": BUDGET, "batch_size": 3}


@cache
def made_pair(family: str, size: float = 0.15) -> Pair:
    """IN, and an RL that differs from it by noise of `size` standard deviations of each weight."""
    seed = SEEDS.get(family, 3)
    in_, rl = tiny(family, seed), tiny(family, seed)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in rl.model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0) * size
            )
    opened = (HookedVLM(each.model.requires_grad_(False), each.processor, check=False) for each in (in_, rl))
    return Pair(*opened, trace_format=FREE)


@cache
def many(family: str) -> tuple[Example, ...]:
    """Enough of them for the rules that hide numbers (`interp.statistics.MIN_EXAMPLES`), each with its own images."""
    made = tiny(family, 3)
    return tuple(
        replace(e, id=f"{e.id}-{i}", images=tuple(made.images(len(e.images), seed=5 * i + k)))
        for i in range(3)
        for k, e in enumerate(examples(family))
    )


def examples(family: str) -> tuple[Example, ...]:
    questions = (
        "what color is the star ?",
        "how many red",
        "is there a star in row 3 ?",
        "circle",
        "no less than 2 ?",
    )
    made = tiny(family, 3)
    return tuple(
        Example(str(i), tuple(made.images(1 + i % 2, seed=i)), question, "?")
        for i, question in enumerate(questions)
    )


class BruteForce:
    """What each model would write, found with full forward passes of single rows."""

    def __init__(self, pair: Pair, example: Example) -> None:
        self.pair, self.prompt = pair, pair.builder.build(example)

    def logits(self, name: str, ids: list[int]) -> torch.Tensor:
        return self.pair.models[name].model(**self.prompt.with_tokens(ids).inputs).logits[0, -1]

    def next(self, name: str, ids: list[int]) -> int:
        logits = self.logits(name, ids).clone()
        logits[list(self.pair.builder.suppressed_ids)] = -torch.inf
        return int(logits.argmax())

    def write(self, name: str, ids: list[int]) -> list[int]:
        ends = self.pair.builder.end_ids
        while len(ids) < BUDGET and not (ids and ids[-1] in ends):
            ids = [*ids, self.next(name, ids)]
        return ids


@cache
def written(family: str, name: str) -> list[list[int]]:
    pair = made_pair(family)
    return [BruteForce(pair, example).write(name, []) for example in examples(family)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "idefics3"])
def test_greedy_writes_the_arg_max_of_full_forward_passes(family):
    pair = made_pair(family)
    prompts = [pair.builder.build(example) for example in examples(family)]
    own = pair.rl.model.generation_config
    own.repetition_penalty, own.temperature, own.do_sample = (
        5.0,
        3.0,
        True,
    )  # a checkpoint's settings must not bend it
    assert greedy(pair.rl, prompts, BUDGET, batch_size=2) == written(family, "rl")
    assert pair.rl.model.generation_config is own and own.repetition_penalty == 5.0
    own.repetition_penalty = own.temperature = own.do_sample = None


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_first_is_where_the_models_part(family):
    pair = made_pair(family)
    found = find_decisions(pair, examples(family), "first", **SETTINGS)
    expected = {}
    for row, (of_rl, of_in) in enumerate(zip(written(family, "rl"), written(family, "in"), strict=True)):
        index = next((i for i, (a, b) in enumerate(zip(of_rl, of_in, strict=False)) if a != b), None)
        if index is not None:
            expected[row] = (index, of_rl[index], of_in[index])
    assert len(expected) >= 2  # the test has something to see
    assert {d.row: (d.index, d.rl_token, d.in_token) for d in found.decisions} == expected
    assert found.n_diverge == len(found) == found.n_prompts - sum(found.excluded.values())
    assert found.n_unstable == 0
    for decision, in_value, rl_value in zip(found.decisions, found.in_values, found.rl_values, strict=True):
        assert decision.prompt.trace_ids == written(family, "rl")[decision.row][: decision.index]
        assert decision.role == "answer"
        brute = BruteForce(pair, decision.example)
        for name, value in (("in", in_value), ("rl", rl_value)):
            logits = brute.logits(name, decision.prompt.trace_ids)
            assert value == pytest.approx(
                float(logits[decision.rl_token] - logits[decision.in_token]), abs=1e-4
            )
        assert in_value < 0 < rl_value
    pairs = {(rl, in_): n for rl, in_, n in found.token_pairs(None)}
    assert sum(pairs.values()) == len(found)


def last_word(prediction: str | None, example: Example) -> bool:
    return prediction is not None and prediction.split()[-1:] == example.answer.split()[-1:]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_decisive_is_the_first_token_that_makes_in_end_right(family):
    pair = made_pair(family)
    decode = pair.builder.decode
    # right is what ends in the word that RL ends in, except for one example that RL gets wrong
    truths = [decode(ids) for ids in written(family, "rl")]
    truths[1] = "never"
    asked = [dataclasses.replace(e, answer=t) for e, t in zip(examples(family), truths, strict=True)]
    found = find_decisions(pair, asked, "decisive", grader=last_word, **SETTINGS)
    expected, in_right = {}, []
    for row, example in enumerate(asked):
        brute, trace = BruteForce(pair, example), written(family, "rl")[row]
        in_right.append(last_word(decode(written(family, "in")[row]), example))
        if row == 1 or in_right[row]:
            continue
        for index, token in enumerate(trace):
            other = brute.next("in", trace[:index])
            if other != token and last_word(decode(brute.write("in", trace[: index + 1])), example):
                expected[row] = (index, token, other)
                break
    assert {d.row: (d.index, d.rl_token, d.in_token) for d in found.decisions} == expected
    assert expected
    assert found.in_correct.tolist() == in_right
    assert found.rl_correct.tolist() == [True, False, True, True, True]
    assert found.excluded["RL is wrong"] == 1
    assert found.excluded.get("IN is right already", 0) == sum(in_right)
    assert len(found) + sum(found.excluded.values()) == found.n_prompts == 5


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_soft_needs_no_divergence_and_weighs_the_difference_of_probabilities(family):
    pair = made_pair(family)
    found = find_decisions(pair, examples(family)[:3], "soft", **SETTINGS)
    assert len(found) == 3 and not found.excluded
    for decision, in_value, rl_value in zip(found.decisions, found.in_values, found.rl_values, strict=True):
        prompt, n = decision.prompt, decision.prompt.n_prompt_tokens
        assert prompt.trace_ids == written(family, "rl")[decision.row]
        logits = {name: vlm.model(**prompt.inputs).logits[0, n - 1 : -1] for name, vlm in pair.models.items()}
        weight = logits["rl"].softmax(-1) - logits["in"].softmax(-1)
        assert in_value == pytest.approx(float((weight * logits["in"]).sum()), abs=1e-4)
        assert rl_value == pytest.approx(float((weight * logits["rl"]).sum()), abs=1e-4)
        p, q = logits["rl"].log_softmax(-1), logits["in"].log_softmax(-1)
        both_ways = float((p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum())  # Jeffreys divergence
        assert rl_value - in_value == pytest.approx(both_ways, abs=1e-4)


def test_what_stands_beside_a_recovery():
    pair = made_pair("qwen2_5_vl")
    found = find_decisions(pair, examples("qwen2_5_vl"), "first", **SETTINGS)
    told = json.loads(json.dumps(found.summary(fewest=5)))
    difference = found.rl_values - found.in_values
    assert told["denominator"]["value"] == pytest.approx(difference.mean())
    assert told["denominator"]["low"] <= difference.mean() <= told["denominator"]["high"]
    assert told["n_prompts"] == 5 and told["n_qualify"] == told["denominator"]["n"] == len(found)
    assert sum(entry["n"] for entry in told["token_pairs"]) == len(found)
    assert told["units"] == "nats" and told["trace_index"]["max"] == max(
        d.index or 0 for d in found.decisions
    )


def test_traces_that_do_not_parse_are_counted():
    models = made_pair("qwen2_5_vl")
    pair = Pair(models.in_, models.rl, trace_format=TraceFormat())
    found = find_decisions(pair, examples("qwen2_5_vl"), "first", **SETTINGS)
    for name in ("in", "rl"):
        assert sum(found.unparsed[name].values()) == 5
    assert not found.rl_correct.any()


@pytest.mark.parametrize("family", EACH_KIND)
def test_the_diagonal_of_two_by_two_is_the_models_as_they_are(family):
    pair = made_pair(family)
    found = find_decisions(pair, examples(family), "first", **SETTINGS)
    assert len(found) >= 2
    pair.in_.model(
        **found.prompts[0].inputs
    )  # leaves a multimodal offset in the model, which must not matter
    table = two_by_two(pair, found, batch_size=2)
    assert table.dims == ("weights", "prefix", "example") and table.attrs["units"] == "nats"
    for name, values in (("in", found.in_values), ("rl", found.rl_values)):
        assert np.allclose(table.sel(weights=name, prefix=name), values, atol=1e-4)
    for weights, prefix in (("in", "rl"), ("rl", "in")):
        off = table.sel(weights=weights, prefix=prefix).values
        assert np.abs(off - found.in_values).min() > 1e-3 and np.abs(off - found.rl_values).min() > 1e-3
    if family in ("qwen2_5_vl", "llava"):
        assert table.sel(weights="rl", prefix="in").values[0] == pytest.approx(
            mixed(pair, found, 0), abs=1e-4
        )


def mixed(pair: Pair, found, row: int) -> float:
    """RL's weights on IN's keys and values, by generation's own way of preparing a step."""
    prompt, decision = found.prompts[row], found.decisions[row]
    before = (
        pair.in_.model(**prompt.builder.with_trace(prompt, prompt.trace_ids[:-1]).inputs, use_cache=True)
        if (prompt.trace_ids)
        else None
    )
    if before is None:  # the prefix ends inside the prompt: cut the cache of the whole prompt
        before = pair.in_.model(**prompt.inputs, use_cache=True)
        before.past_key_values.crop(len(prompt) - 1)
    if hasattr(pair.rl.model.model, "rope_deltas"):
        pair.rl.model.model.rope_deltas = pair.in_.model.model.rope_deltas
    logits = pair.rl.model(
        input_ids=prompt.inputs["input_ids"][:, -1:],
        attention_mask=None,
        past_key_values=before.past_key_values,
    ).logits[0, -1]
    return float(logits[decision.rl_token] - logits[decision.in_token])


def test_two_by_two_needs_one_token():
    pair = made_pair("qwen2_5_vl")
    with pytest.raises(FrankenlensError, match="choose first or decisive, not soft"):
        two_by_two(pair, find_decisions(pair, examples("qwen2_5_vl")[:1], "soft", **SETTINGS))


def test_a_pair_that_learnt_noise_is_refused():
    pair = made_pair("qwen2_5_vl")
    hashes = [weights_sha256(vlm.model) for vlm in (pair.in_, pair.rl)]
    for choice in ("first", "soft"):
        found = find_decisions(pair, many("qwen2_5_vl"), choice, **SETTINGS)
        nulls = null_pair_denominator(pair, found, batch_size=2)
        assert list(nulls) == ["bf16", "bf16, own decisions", "random", "random, own decisions"]
        assert "pair that learnt nothing" in recovery_refused(found, nulls)
        assert float(nulls["random, own decisions"].value) > 0
    assert [weights_sha256(vlm.model) for vlm in (pair.in_, pair.rl)] == hashes


def test_what_refuses_a_recovery_is_told():
    """At 12 prompts a null pair has no interval to print; how high it lies is said, as that decides."""
    low, high = np.linspace(0, 4, 12), np.linspace(2.2, 2.8, 12)
    nulls = {"random": Null.of(low, None)}
    found = Mock(spec=DecisionSet, denominator=lambda **settings: mean_interval(high, **settings))
    reach = stats.t.interval(0.95, 11, low.mean(), stats.sem(low))[1]
    assert nulls["random"].reach == pytest.approx(reach, rel=0.01) and low.mean() < high.min()
    told = recovery_refused(found, nulls)
    assert f"(random), 2 [no interval] but up to {nulls['random'].reach:.3g}" in told
    assert recovery_refused(found, {"random": Null.of(low / 2, None)}) == ""


def test_the_random_pair_has_the_norm_of_the_update_in_every_tensor(monkeypatch):
    pair = made_pair("qwen2_5_vl")
    found = find_decisions(pair, examples("qwen2_5_vl"), "first", **SETTINGS)
    seen = []
    before = {name: p.clone() for name, p in pair.in_.model.named_parameters()}

    def spy(vlm, prompts, metric, batch_size):
        if vlm is pair.in_ and not seen:
            seen.append({name: (p - before[name]).norm() for name, p in vlm.model.named_parameters()})
        return evaluate(vlm, prompts, metric, batch_size)

    monkeypatch.setattr("interp.decision.null_pairs.evaluate", spy)
    null_pair_denominator(pair, found)
    theirs = dict(pair.rl.model.named_parameters())
    for name, norm in seen[0].items():
        assert float(norm) == pytest.approx(float((theirs[name] - before[name]).norm()), rel=1e-3)


def test_a_pair_of_one_model_has_no_decision():
    pair = made_pair("llava")
    same = Pair(pair.in_, pair.in_, trace_format=FREE)
    for choice in ("first", "decisive"):
        found = find_decisions(
            same, examples("llava"), choice, grader=lambda answer, example: True, **SETTINGS
        )
        assert len(found) == 0 and found.n_diverge == 0 and sum(found.excluded.values()) == 5
        assert found.summary()["denominator"]["value"] is None
        assert two_by_two(same, found).shape == (2, 2, 0)
        nulls = null_pair_denominator(same, found)
        refused = recovery_refused(found, nulls)
        assert refused.startswith(
            f"the denominator has no interval (0 of 5 prompts have the decision {choice!r}); "
        )
        assert "give more than 5 examples (--n)" in refused and "soft, which every prompt has" in refused
        for method in (component_map, attribute, lambda *a: pair_paths(*a, receivers=["logits"])):
            with pytest.raises(
                FrankenlensError,
                match=rf"None of 5 prompts qualifies for .*{choice}.* \(--n\).*--decision.*soft",
            ):
                method(same, found)


def test_a_recovery_needs_a_denominator_above_those_of_nothing():
    found = find_decisions(made_pair("llava"), examples("llava")[:2], "soft", **SETTINGS)

    def interval(low, high):
        return Interval(np.array((low + high) / 2), np.array(low), np.array(high), np.array(9))

    refused = partial(recovery_refused, clusters=None)  # nine values of no prompt
    with_values = dataclasses.replace(found, in_values=np.zeros(9), rl_values=np.linspace(2.0, 3.0, 9))
    assert refused(with_values, {"random": interval(-0.1, 0.1)}) == ""
    assert "(random)" in refused(with_values, {"random": interval(1.0, 2.9)})
    assert "(random)" in refused(with_values, {"random": interval(5.0, 6.0)})
    centred = dataclasses.replace(found, in_values=np.zeros(9), rl_values=np.linspace(-1.0, 1.0, 9))
    assert "of 9 of 2 prompts, includes 0; give more than 2 examples (--n)" in refused(centred, {})
    assert "--decision" in refused(dataclasses.replace(centred, choice="first"), {})


def test_changed_weights_are_put_back_even_after_an_error():
    vlm = made_pair("llava").in_
    before = weights_sha256(vlm.model)

    def change(name, weight):
        if "vision" in name:
            raise RuntimeError("stop")
        return weight + 1

    with pytest.raises(RuntimeError, match="stop"), changed_weights(vlm.model, change):
        pass
    assert weights_sha256(vlm.model) == before


def test_metrics_of_a_model_do_not_depend_on_the_batch():
    pair = made_pair("qwen2_5_vl")
    found = find_decisions(pair, examples("qwen2_5_vl"), "first", **SETTINGS)
    metric = TraceLogLikelihood()
    for trace, value in zip(found.rl_traces, evaluate(pair.in_, found.rl_traces, metric, 2), strict=True):
        log_p = pair.in_.model(**trace.inputs).logits[0].log_softmax(-1)
        terms = [log_p[i - 1, trace.ids[i]] for i in range(trace.n_prompt_tokens, len(trace))]
        assert value == pytest.approx(float(sum(terms)), abs=1e-3)
    batch = collate(found.prompts)
    reference = KLToReference.from_logits(pair.rl.model(**batch.inputs).logits, batch)
    assert np.allclose(evaluate(pair.rl, found.prompts, reference, 2), 0, atol=1e-4)
    assert (evaluate(pair.in_, found.prompts, reference, 1) > 1e-3).all()


def test_an_unknown_choice_names_the_choices():
    with pytest.raises(FrankenlensError, match="choice of first, decisive, soft"):
        find_decisions(made_pair("llava"), examples("llava"), "last")
    with pytest.raises(FrankenlensError, match="0 examples"):
        find_decisions(made_pair("llava"), [])


def test_an_answer_that_cannot_be_graded_is_left_out_and_counted() -> None:
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    examples = sample("sum", 12, seed=3, split="map")
    every = find_decisions(pair, examples, "decisive", progress=False)
    lost = every.decisions[0].prompt.example.id

    def grader(answer: str | None, example: Example) -> bool:
        if example.id == lost:
            raise Ungraded("the reference cannot be read")
        return grade(answer, example)

    some = find_decisions(pair, examples, "decisive", grader=grader, progress=False)
    assert some.excluded["an answer cannot be graded"] == 1
    assert [d.prompt.example.id for d in some.decisions] == [
        d.prompt.example.id for d in every.decisions if d.prompt.example.id != lost
    ]
    assert sum(some.excluded.values()) + len(some) == len(examples)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_random_pair_is_as_large_in_half_precision_too(dtype) -> None:
    """Entries of RL's update, shuffled, round at larger weights: such a pair had 0.5 to 0.9 of RL's norm."""
    in_, rl = half_pair(dtype)
    pair = Pair(in_, rl, trace_format=FREE)
    before = {name: p.detach().double() for name, p in in_.model.named_parameters()}
    theirs = {name: p.detach().double() for name, p in rl.model.named_parameters()}
    digest = weights_sha256(in_.model)
    _, change = null_changes(pair, seed=4)["random"]
    assert isinstance(change, RandomUpdate)
    seen = []
    for _ in range(2):
        with changed_weights(in_.model, change):
            seen.append({name: p.detach().double() for name, p in in_.model.named_parameters()})
    assert weights_sha256(in_.model) == digest
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in before)
    for name, value in before.items():
        asked, moved = (float((some[name] - value).norm()) for some in (theirs, seen[0]))
        if value.numel() > 500:
            assert moved == pytest.approx(asked, rel=0.02), name
    sizes = [
        sum(float((s[n] - v).square().sum()) for n, v in before.items()) ** 0.5 for s in (theirs, seen[0])
    ]
    assert change.held.norm_ratio == pytest.approx(sizes[1] / sizes[0], rel=1e-6)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_a_random_pair_that_is_too_small_is_refused_and_a_refusal_says_its_size(monkeypatch) -> None:
    in_, rl = half_pair(torch.bfloat16)
    pair = Pair(in_, rl, trace_format=FREE)
    found = find_decisions(pair, examples("qwen2_5_vl"), "soft", **SETTINGS)
    nulls = null_pair_denominator(pair, found)
    assert list(nulls) == [
        "random",
        "random, own decisions",
    ]  # nothing is to be learnt from rounding bfloat16 to it
    null = nulls["random"]
    assert isinstance(null, Null) and null.held is not None
    assert null.held.norm_ratio == pytest.approx(1, abs=0.02)
    assert float(nulls["random, own decisions"].value) >= 0
    large = Null(np.array(9.0), np.array(8.0), np.array(10.0), np.array(9), held=null.held)
    with_values = dataclasses.replace(found, in_values=np.zeros(9), rl_values=np.linspace(2.0, 3.0, 9))
    told = recovery_refused(with_values, {"random": large}, clusters=None)
    assert f"whose update has {null.held.norm_ratio:.2f} of the norm of RL's" in told
    monkeypatch.setattr("interp.decision.null_pairs.as_large", lambda own, update, seed: own)
    with pytest.raises(
        FrankenlensError, match="the random update beside RL's: weights in bfloat16 hold 0.00"
    ):
        null_pair_denominator(pair, found)
