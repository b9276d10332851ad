"""The decisions whose prompts have tokens of a role."""

import numpy as np

from experiments import embedded
from interp.decision import find_decisions
from interp.metrics import evaluate
from interp.pair.pair import Pair
from interp.questions.tasks import sample


def test_the_rest_is_left_out_with_its_metric_and_values() -> None:
    pair = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    every = find_decisions(pair, sample("sum", 10, 0, "map"), "first", max_new_tokens=48, progress=False)
    assert every.having("all") is every and every.having("decision") is every
    some = every.having("reasoning")
    rows = [row for row, prompt in enumerate(every.prompts) if "reasoning" in prompt.roles]
    assert 0 < len(some) == len(rows)
    assert [one.row for one in some.decisions] == [every.decisions[row].row for row in rows]
    np.testing.assert_array_equal(some.rl_values, every.rl_values[rows])
    np.testing.assert_allclose(evaluate(pair.rl, some.prompts, some.metric), some.rl_values, atol=1e-4)
    assert some.n_prompts == every.n_prompts == 10
    assert len(every.having("answer")) <= len(every)
    pair.close()
