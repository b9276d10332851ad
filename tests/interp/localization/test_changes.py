"""What counts as a changed answer: three rules on the same answers, and the rates that follow."""

import numpy as np
import pytest
import xarray as xr

from hooks.errors import FrankenlensError
from interp.localization import RULES, outcome_shares, with_changes
from interp.localization.changes import changed_in_text, differs_in_code
from interp.localization.outcomes import OUTCOMES, outcome
from interp.questions.examples import Example
from interp.questions.grading import grade

HOW = {
    "counting": {"grader": "number"},
    "ocr": {"grader": "text"},
    "grounding": {"grader": "box", "iou": 0.5},
    "recognition": {"grader": "choice", "choices": ("Yes", "No")},
}


def pair(function: str, target: str, source: str) -> tuple[Example, Example]:
    one, other = (Example(name, (), "q?", name, function, meta=HOW[function]) for name in (target, source))
    return one, other


@pytest.mark.parametrize(
    ("function", "target", "source", "own", "now", "text", "code"),
    [
        ("counting", "3", "5", "3", "three", False, True),
        ("counting", "3", "5", "There are 3.", "There are 5.", True, True),
        ("ocr", "STOP", "EXIT", "STOP", "Stop.", False, False),
        ("ocr", "STOP", "EXIT", "STOP", "EXIT", True, True),
        ("grounding", "0,0,10,10", "50,50,60,60", "0,0,10,10", "50,50,60,61", True, True),
        (
            "grounding",
            "0,0,10,10",
            "50,50,60,60",
            "0,0,10,10",
            "20,20,30,30",
            False,
            True,
        ),  # moved, but elsewhere
        ("grounding", "0,0,10,10", "50,50,60,60", "0,0,10,10", "", False, True),
        ("recognition", "Yes", "No", "Yes", "No, there is none.", True, True),
        ("recognition", "Yes", "No", "Yes", "Yes", False, False),
        ("recognition", "Yes", "No", "No", "No", True, False),  # the share of No counts what was No before
    ],
)
def test_a_rule_is_what_the_paper_says(function, target, source, own, now, text, code) -> None:
    two = pair(function, target, source)
    assert changed_in_text(now, own, two) is text
    assert differs_in_code(own, now) is code


def test_long_texts_that_hold_each_other_are_the_same_to_the_code() -> None:
    long = "There are three red squares here"
    assert not differs_in_code(long, f"Yes. {long}!") and differs_in_code(
        long, "There are four red squares here"
    )


def test_the_change_rate_follows_the_rule() -> None:
    pairs = [pair("grounding", "0,0,10,10", "50,50,60,60")] * 3
    answers = ["0,0,10,10", "20,20,30,30", "50,50,60,60"]
    scored = [
        OUTCOMES.index(outcome(now, "0,0,10,10", "50,50,60,60", *two, grade))
        for now, two in zip(answers, pairs, strict=True)
    ]
    found = xr.Dataset(
        {
            "outcome": (("swap", "example"), np.array([scored], float)),
            "text": (("swap", "example"), np.array([answers])),
            "clean": (("side", "example"), np.array([["0,0,10,10"] * 3, ["50,50,60,60"] * 3])),
            "differs": ("example", [True] * 3),
        },
        {"swap": ["kv 0-8"], "first": ("swap", [0]), "last": ("swap", [8]), "what": ("swap", ["kv"])}
        | {"side": ["target", "source"], "function": ("example", ["grounding"] * 3)},
    )
    rates = {}
    for rule in RULES:
        table = outcome_shares(with_changes(found, pairs, rule), "all")
        rates[rule] = float(table.loc[table["outcome"] == "changed", "value"].iloc[0])
        assert float(table.loc[table["outcome"] == "source", "value"].iloc[0]) == pytest.approx(1 / 3)
    assert rates == pytest.approx({"graded": 2 / 3, "text": 1 / 3, "code": 2 / 3})
    assert outcome_shares(found, "all").equals(outcome_shares(with_changes(found, pairs, "graded"), "all"))
    with pytest.raises(FrankenlensError, match="graded, text, code"):
        with_changes(found, pairs, "words")
