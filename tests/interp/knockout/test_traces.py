"""The traces that routes are cut in, and the table of models that learnt nothing."""

import numpy as np
import pandas as pd
import xarray as xr

from interp.knockout import answered_traces, null_route_table, route_table, up_to_the_answer, wrong
from interp.pair.generation import greedy
from interp.questions.examples import Example
from interp.questions.grading import Ungraded
from interp.questions.tasks import grade, sample

EXAMPLES = [example for task in ("sum", "more") for example in sample(task, 6, 3, "test")]


def test_they_are_greedy_cut_at_the_answer_and_counted(pair) -> None:
    running = {"max_new_tokens": 40, "batch_size": 5, "progress": False}
    kept, left_out = answered_traces(pair.in_, pair.builder, EXAMPLES, **running)
    asked = [pair.builder.build(example) for example in EXAMPLES]
    whole = [p.with_tokens(ids) for p, ids in zip(asked, greedy(pair.in_, asked, 40), strict=True)]
    expected = [cut for cut, _ in map(up_to_the_answer, whole) if cut is not None]
    assert [trace.ids for trace in kept] == [trace.ids for trace in expected]
    assert sum(left_out.values()) == len(EXAMPLES) - len(kept)
    right, reasons = answered_traces(pair.in_, pair.builder, EXAMPLES, fault=wrong(grade), **running)
    good = [grade(trace.trace.answer, trace.example) for trace in whole]
    assert 0 < len(right) == sum(good) < len(kept)  # IN cannot count what it reasons about
    assert reasons["the answer is wrong"] == len(kept) - len(right)


def test_what_cannot_be_graded_says_why(pair) -> None:
    def never(answer: str | None, example: Example) -> bool:
        raise Ungraded("no key")

    kept, left_out = answered_traces(
        pair.in_, pair.builder, EXAMPLES[:2], fault=wrong(never), max_new_tokens=40, progress=False
    )
    assert not kept and left_out == {"the answer cannot be graded: no key": 2}


def test_models_that_learnt_nothing_stand_against_those_they_were_made_from() -> None:
    rng = np.random.default_rng(0)
    models, n = ["in", "rl", "bf16", "random"], 40
    value = rng.normal(size=(4, 2, 3, n))
    found = xr.Dataset(
        {
            "value": (("model", "route", "window", "example"), value),
            "control": (("model", "route", "window", "example"), value / 2),
            "clean": (("model", "example"), rng.normal(size=(4, n))),
        },
        coords={
            "model": models, "route": ["a", "b"], "control_kind": ("route", ["keys", "edges"]),
            "window": ["0-1", "1-2", "2-3"], "first": ("window", [0, 1, 2]), "last": ("window", [1, 2, 3]),
        },
        attrs={"units": "nats"},
    )  # fmt: skip
    table = null_route_table(found)
    for name, made_of in (("bf16", "rl"), ("random", "in")):
        own = table.loc[table["null"] == name].drop(columns="null").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, route_table(found, models=(made_of, name)))
    assert set(null_route_table(found.sel(model=["in", "rl", "random"]))["null"]) == {"random"}
