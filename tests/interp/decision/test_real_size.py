"""Decisions at the vocabulary of real models: nothing of [tokens, words] is kept, and the numbers are the same."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from hooks import FrankenlensError, batches
from hooks.memory import memory_limit
from hooks.spilled import Spill, Spilled
from interp.decision import find_decisions, null_pair_denominator, soft
from interp.decision.null_pairs import changed_weights, null_changes
from interp.metrics import SoftDifference, evaluate
from interp.pair.pair import Pair
from interp.questions.tasks import sample

N = 6


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """Seven places at a time, no weight of the soft metric kept, and most states in a file."""
    monkeypatch.setitem(batches.AT_ONCE, "cpu", 7 * pair.in_.n_logits)
    monkeypatch.setattr("hooks.spilled.IN_MEMORY", 20_000)
    for name in ("interp.decision.soft.DENSE", "interp.metrics.kinds.HELD"):
        monkeypatch.setattr(name, 0)


@pytest.mark.parametrize("choice", ["first", "decisive", "soft"])
def test_in_chunks_the_decisions_and_their_numbers_are_the_same(
    pair: Pair, choice: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    examples = sample("sum", 12 if choice == "decisive" else N, seed=0, split="map")
    settings: dict[str, Any] = {"max_new_tokens": 40, "batch_size": 4}
    whole = find_decisions(pair, examples, choice, **settings)
    nulls = null_pair_denominator(pair, whole, n_draws=1)
    request.getfixturevalue("chunked")
    found = find_decisions(pair, examples, choice, **settings)
    assert len(found) == len(whole) > 0
    assert [d.prompt.ids for d in found.decisions] == [d.prompt.ids for d in whole.decisions]
    assert (found.n_diverge, found.n_unstable) == (whole.n_diverge, whole.n_unstable)
    size = max(1.0, float(np.abs([whole.in_values, whole.rl_values]).max()))
    for name in ("in_values", "rl_values"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=0, atol=1e-5 * size)
    assert np.abs(whole.rl_values - whole.in_values).max() > 1e-3 * size
    for label, null in null_pair_denominator(pair, found, n_draws=1).items():
        assert float(null.value) == pytest.approx(float(nulls[label].value), abs=1e-5 * size, nan_ok=True), (
            label
        )


@pytest.mark.usefixtures("chunked")
def test_soft_weights_are_what_the_models_were_whatever_happens_to_them(pair: Pair) -> None:
    """By hand, from Hugging Face's own logits; the same when IN's weights are others."""
    examples = sample("sum", 3, seed=0, split="map")
    found = find_decisions(pair, examples, "soft", max_new_tokens=40)
    assert isinstance(found.metric, SoftDifference)
    assert all(isinstance(one, soft.Change) for one in found.metric.weights)
    expected, size = [], 1.0
    for trace in found.rl_traces:
        with torch.no_grad():
            of_in, of_rl = (vlm.model(**trace.inputs).logits[0].double() for vlm in (pair.in_, pair.rl))
        steps = slice(trace.n_prompt_tokens - 1, len(trace) - 1)
        weights = of_rl[steps].softmax(-1) - of_in[steps].softmax(-1)
        expected.append(float((weights * of_in[steps]).sum()))
        size = max(size, float(of_in.abs().max()))
    np.testing.assert_allclose(found.in_values, expected, rtol=0, atol=1e-5 * size)
    (_, change) = null_changes(pair)["random"]
    with changed_weights(pair.in_.model, change):
        now = [one[0:5] for one in found.metric.weights]
        moved = evaluate(pair.in_, found.prompts, found.metric)
    before = [one[0:5] for one in found.metric.weights]
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    assert np.abs(moved - found.in_values).max() > 1e-3 * size


def test_a_budget_makes_batches_smaller_and_changes_nothing(pair: Pair) -> None:
    examples = sample("sum", N, seed=0, split="map")
    whole = find_decisions(pair, examples, "first", max_new_tokens=40)
    sizes: list[int] = []
    handle = pair.rl.model.register_forward_pre_hook(
        lambda _, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    try:
        with memory_limit("3MiB"):
            found = find_decisions(pair, examples, "first", max_new_tokens=40)
    finally:
        handle.remove()
    assert 1 <= sizes[0] < N  # what it writes first
    np.testing.assert_allclose(found.rl_values, whole.rl_values, rtol=0, atol=1e-4)


def peak_of(choice: str, n_traces: int, n_tokens: int) -> dict[str, Any]:
    """In a process of its own, whose memory is nobody else's."""
    command = [sys.executable, "-m", "tests.real_size", choice, str(n_traces), str(n_tokens)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(told.splitlines()[-1])


def test_soft_decisions_at_a_real_vocabulary_take_a_fraction_of_their_logits() -> None:
    found = peak_of("soft", 6, 60)
    logits = 4 * sum(found["steps"]) * 151_936
    assert logits > 150 * 2**20
    assert abs(found["denominator"]) > 1e-3
    assert found["peak"] < 450 * 2**20  # three copies of them, and IN's and RL's, would be five times as much


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["first", "decisive", "soft"])
def test_32_traces_of_2000_tokens_of_151936_words_take_at_most_one_and_a_half_gib(choice: str) -> None:
    found = peak_of(choice, 32, 2000)
    assert sum(found["steps"]) > 32 * 1000
    assert found["peak"] <= 1.5 * 2**30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_a_file_are_those_that_were_kept(dtype: torch.dtype) -> None:
    """Bit for bit, NaN and infinity too, in any order, and when they are copied or pickled."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(n, 5, generator=generator).to(dtype) for n in (3, 1, 0, 40, 7)]
    given[3][2, 1], given[3][39, 4] = torch.nan, -torch.inf
    spill = Spill(most=3 * 5 * given[0].itemsize)
    kept = [spill.keep(one) for one in given]
    assert [isinstance(one, Spilled) for one in kept] == [False, True, False, True, True]
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    for i in (3, 0, 4, 1, 2):
        for some in (slice(None), slice(1, 3), slice(5, 2), slice(-2, None), slice(0, 99)):
            assert torch.equal(kept[i][some].view(bits), given[i][some].view(bits))
        assert len(kept[i]) == len(given[i])
    for again in (copy.deepcopy(kept[3]), pickle.loads(pickle.dumps(kept[3]))):
        assert torch.equal(again[:].view(bits), given[3].view(bits))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_that_reads_states_takes_none_of_its_parents() -> None:
    """The two have one file, and one place in it."""
    spill = Spill(most=0)
    states = [torch.full((40, 64), float(n)) for n in range(64)]
    kept = [spill.keep(one) for one in states]

    def wrong(times: int) -> int:
        return sum(not torch.equal(one[:], states[n]) for _ in range(times) for n, one in enumerate(kept))

    child = os.fork()
    if not child:
        try:
            found = wrong(120)
        except BaseException:
            found = 1
        os._exit(min(found, 1))
    here = wrong(120)
    _, status = os.waitpid(child, 0)
    assert here == 0 and os.waitstatus_to_exitcode(status) == 0


def test_where_the_disk_is_full_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    spill = Spill(most=0)
    spill.keep(torch.ones(2, 2))

    def full(self: Any, data: Any) -> int:
        raise OSError(28, "No space left on device")

    file = spill._file
    assert file is not None
    monkeypatch.setattr(file, "_file", type("Full", (), {"seek": lambda s, at: at, "write": full})())
    with pytest.raises(FrankenlensError, match="TMPDIR"):
        spill.keep(torch.ones(2, 2))
