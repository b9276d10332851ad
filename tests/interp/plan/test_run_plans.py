"""Forward passes, written text and decisions: what is planned against what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.decision import find_decisions, null_pair_denominator, two_by_two
from interp.metrics.logits import run_for_logits
from interp.plan import decisions as plans
from interp.plan.arithmetic import Arithmetic
from interp.plan.images import pictures_of
from interp.plan.machine import amount, duration, measured_rate, parse_rate
from interp.plan.prompts import Workload, stated, with_trace
from interp.plan.runs import Runs
from interp.plan.structure import without_weights
from interp.plan.work import Work, together
from interp.prompts import collate
from interp.questions.tasks import sample
from tests.interp.plan.kinds import KINDS, models, prompts
from tests.interp.plan.test_map_plans import counted


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_forward_pass(kind: str) -> None:
    vlm, _ = models(kind)
    batch = collate(prompts(kind, vlm, 2, 40))
    planned = Arithmetic(without_weights(vlm)).forward(2, 40, pictures_of(vlm, batch.prompts), 2)
    assert planned == counted(lambda: run_for_logits(vlm, batch.inputs))


@pytest.mark.parametrize("choice", ["soft", pytest.param("first", marks=pytest.mark.slow)])
def test_flops_of_decisions_and_of_pairs_that_learnt_nothing(pair: Any, choice: str) -> None:
    examples, found = sample("sum", 6, seed=0, split="map"), []
    run = counted(
        lambda: found.append(find_decisions(pair, examples, choice, max_new_tokens=16, batch_size=3))
    )
    (decided,) = found
    steps = [len(trace.trace_ids) for trace in decided.rl_traces]
    assert len(set(steps)) == 1  # a plan knows one length
    at = sum(one.index or 0 for one in decided.decisions) / max(1, len(decided)) / steps[0]
    share = 1.0 if choice == "soft" else len(decided) / len(examples)
    built = [pair.builder.build(example) for example in examples]
    asked = Workload(built, len(built), steps[0], share, at)
    runs = Runs(without_weights(pair.in_), 3)
    works = plans.found_decisions(runs, asked, choice)
    assert sum(work.flops for work in works) == pytest.approx(run, rel=0.1)
    if choice == "soft":
        nulls = counted(lambda: null_pair_denominator(pair, decided, 0, 3, n_draws=1))
        own = plans.null_pairs(runs, asked, choice)
        assert own.flops == pytest.approx(nulls * 5 / 2, rel=0.02)  # IN's four draws, and RL rounded
    else:
        both = counted(lambda: two_by_two(pair, decided, 3))
        assert plans.two_by_two(runs, asked).flops == pytest.approx(both, rel=0.25)  # its rows end anywhere


def test_prompts_of_stated_numbers() -> None:
    some = stated(3, 50, 20)
    assert [len(one) for one in some] == [50] * 3 and some[0].roles.count("image") == 20
    longer = with_trace(some[0], 7)
    assert len(longer) == 57 and longer.n_prompt_tokens == 50 and longer.roles[-7:] == ("reasoning",) * 7
    with pytest.raises(Exception, match="no room for an image of 50"):
        stated(1, 50, 50)
    with pytest.raises(Exception, match="shares from 0 to 1"):
        Workload(some, 3, 10, decided=2.0)


def test_rates_and_amounts() -> None:
    assert parse_rate("50TFLOP/s") == 5e13 and parse_rate("300 gflops") == 3e11
    with pytest.raises(Exception, match="is no rate"):
        parse_rate("fast")
    assert measured_rate(torch.float32, seconds=0.01, side=64) > 0
    assert amount(5e13, "FLOP") == "50 TFLOP" and amount(3 * 2**30, "B", 1024) == "3 GiB"
    assert duration(7200) == "2 h" and duration(90) == "90 s"


def test_work_adds_up_and_the_widest_is_held() -> None:
    one, two = Work("a", 1, 10.0, {"x": 5}, 1), Work("b", 2, 1.0, {"y": 7}, 1)
    both = together("both", [one.times(3), two])
    assert (both.runs, both.flops, both.disk, both.held) == (5, 31.0, 4, {"y": 7})
