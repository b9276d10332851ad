"""Answers that are damaged or misjudged elsewhere; closed forms; and what stays ungraded rather than wrong."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.errors import FrankenlensError
from interp.localization.outcomes import Grader
from interp.questions.examples import Example
from interp.questions.grading import (
    GRADERS,
    Ungraded,
    extract,
    grade,
    iou,
    judge,
    judge_box,
    judge_choice,
    judge_math,
    judge_number,
    judge_text,
    reference_fault,
    require_gradable,
)
from interp.questions.grading.symbols import Unparsed, equal_expressions
from interp.questions.tasks import grade as exact

YES, NO, UNGRADED = True, False, None
BOXES = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


def example(answer: str, **meta) -> Example:
    return Example("e", (), "?", answer, meta=meta)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{3.5}, not 5", "3.5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and an open \boxed{2", "1"),
        ("he has 9.\n#### 1,018", "1,018"),
        ("<answer> 1:3 </answer>", "1:3"),
        ("The answer is 3.5. That is 7/2.", "3.5"),
        ("**Answer:** 3.5", "3.5"),
        ("<think> the answer is 4 </think> The final answer is: 5", "5"),
        ("just 3.5", "just 3.5"),
    ],
)
def test_the_last_statement_is_taken_whole(text, found):
    assert extract(text) == (found, text != found)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        # what the released code damages
        ("3.5", "3.5", YES),
        ("5", "3.5", NO),
        ("3.5", "5", NO),
        ("1:3", "1:3", YES),
        ("1:3", "3", NO),
        ("3", "1:3", NO),
        ("101", "100", NO),
        ("100.5", "100", NO),
        # forms of one number
        ("1,018", "1018", YES),
        ("18", "1,018", NO),
        (r"10{,}080"[:2] + r"\,080", "10080", YES),
        (r"11,\! 111,\! 100", "11111100", YES),
        ("1/2", "0.5", YES),
        (r"$-\frac{1}{2}$", "-0.5", YES),
        ("1 1/2", "1.5", YES),
        (r"1.5 \times 10^{3}", "1500", YES),
        ("−5", "-5", YES),
        ("x = -5", "-5", YES),
        ("There are three items.", "3", YES),
        ("3 cm^2", "3", YES),
        (r"90^\circ", "90", YES),
        ("2 + 3 = 5 apples", "5", YES),
        ("She had 9. So 9 * 2 = $18 every day.", "18", YES),
        # percent
        ("50%", "0.5", YES),
        (r"50\%", "50%", YES),
        ("50", "50%", YES),
        ("0.5", "50%", YES),
        ("5%", "50%", NO),
        ("50%", "50", UNGRADED),
        # nothing, or nothing single
        ("I cannot see it", "5", NO),
        ("3 or 4", "3", UNGRADED),
        ("3,5", "3.5", UNGRADED),
        ("2^10", "2", NO),
        (r"\sqrt{16}", "16", NO),
        ("3x", "3", UNGRADED),
        ("1/0", "1", UNGRADED),
        ("1e999999999", "1", UNGRADED),
        ("5", "many", UNGRADED),
    ],
)
def test_numbers(answer, reference, right):
    found = judge_number(answer, reference)
    assert found.right is right
    assert bool(found.why) or right is not UNGRADED


def test_tolerance_only_where_it_is_asked_for():
    assert judge_number("101", "100", tolerance=1).right is True
    assert judge_number("102", "100", tolerance=1).right is False
    assert judge_number("1.24", "1.2", decimals=1).right is True
    assert judge_number("1.26", "1.2", decimals=1).right is False
    assert judge_number("0.30000000000000001", "0.3").right is False


@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_numbers_are_equal_exactly_where_fractions_are(a: Fraction, b: Fraction):
    assert judge_number(str(a), str(b)).right is (a == b)


@given(st.integers(-(10**9), 10**9), st.integers(0, 9999))
def test_thousands_separators_and_decimals_change_nothing(whole: int, part: int):
    assert judge_number(f"It is {whole:,}.{part:04}.", f"{whole}.{part:04}").right is True


@given(st.text(max_size=40), st.sampled_from(["5", "1:3", "50%"]))
def test_no_text_makes_a_grader_raise(text: str, reference: str):
    assert judge_number(text, reference).right in (True, False, None)
    assert judge_choice(text, "cat", ["dog", "cat"]).right in (True, False, None)
    assert judge_box(text, "1,2,3,4").right in (True, False, None)


@pytest.mark.parametrize(
    ("answer", "reference", "options", "right"),
    [
        ("B", "145°", ["135°", "145°"], YES),
        ("(B) 145°", "145°", ["135°", "145°"], YES),
        ("145°", "B", ["135°", "145°"], YES),
        ("b.", "145°", ["135°", "145°"], YES),
        ("The answer is A.", "145°", ["135°", "145°"], NO),
        ("B. 135°", "145°", ["135°", "145°"], UNGRADED),
        ("Yes, there is a cat.", "Yes", ["Yes", "No"], YES),
        ("A person is there", "Yes", ["Yes", "No"], NO),
        ("yes or no", "No", ["Yes", "No"], UNGRADED),
        ("it is 3.5", "3.5", ["5", "3.5"], YES),
        ("it is 3.5", "5", ["5", "3.5"], NO),
        ("the 1:3 one", "3", ["3", "1:3"], NO),
        ("-5", "5", ["5", "6"], NO),
        ("light blue", "light blue", ["blue", "light blue"], YES),
        ("I think (B) fits", "cat", ["dog", "cat"], YES),
        ("E", "cat", ["dog", "cat"], NO),
        ("cat", "bird", ["dog", "cat"], UNGRADED),
        ("cat", "cat", ["cat", "cat"], UNGRADED),
        ("A", "B", ["B", "A"], UNGRADED),
        ("cat", "cat", [], UNGRADED),
    ],
)
def test_choices(answer, reference, options, right):
    assert judge_choice(answer, reference, options).right is right


@pytest.mark.parametrize(
    "answer",
    [
        "15,320,81,382",
        "[15.0, 320, 81, 382]",
        '```json\n[{"bbox_2d": [15, 320, 81, 382], "label": "red circle"}]\n```',
        "(15,320),(81,382)",
        "x1=15, y1=320, x2=81, y2=382",
        "The box is 15, 320, 81, 382.",
    ],
)
def test_boxes_are_read_in_every_usual_form(answer):
    assert judge_box(answer, "15,320,81,382", 0.999).right is True


def test_boxes_that_are_wrong_and_boxes_that_are_none():
    reference = "0,0,10,10"
    assert judge_box("0,0,10,5", reference).right is False  # IoU is 0.5, not above it
    assert judge_box("0,0,10,5.1", reference).right is True
    assert judge_box("10,10,0,0", reference).why.startswith("the answer's box is empty")
    assert judge_box("no idea", reference).right is False
    assert judge_box("0,0,10,10 or 5,5,9,9", reference).right is None
    assert judge_box("0,0,10,10,0.9", reference).right is None
    assert judge_box("0,0,10,10", "10,0,0,10").right is None


@given(BOXES, BOXES)
def test_iou_counts_shared_pixels(a, b):
    pixels = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
    shared, either = len(pixels[0] & pixels[1]), len(pixels[0] | pixels[1])
    assert iou(a, b) == pytest.approx(shared / either)
    assert iou(a, b) == iou(b, a) and iou(a, a) == 1


def test_text_ignores_case_and_outer_punctuation_only():
    assert judge_text('"Backpropagation."', "backpropagation").right is True
    assert judge_text("back propagation", "backpropagation").right is False
    assert judge_text("x", " . ").right is None


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"\frac{1}{2}", "0.5", YES),
        ("The answer is x^2+1", "1 + x^2", YES),
        (r"$(3,\pi/2)$", r"\left( 3, \frac{\pi}{2} \right)", YES),
        ("Evelyn", r"\text{Evelyn}", YES),
        (r"10\,080", "10080", YES),
        ("10080", r"10\,080", YES),
        ("$18.90", "18.9", YES),
        ("50%", r"50\%", YES),
        ("p - q", "q - p", NO),
        ("3", "1:3", NO),
        ("5", "3.5", NO),
        ("101", "100", NO),
        ("I do not know", "5", NO),
        ("5", "", UNGRADED),
        ("5", "$$", UNGRADED),
    ],
)
def test_mathematics(answer, reference, right):
    assert judge_math(answer, reference).right is right


def test_a_timeout_is_no_wrong_answer(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("interp.questions.grading.symbols._equal", lambda *args: time.sleep(9))
        with pytest.raises(Unparsed, match="within 1 s"):
            equal_expressions(["x + 1"], ["x + 2"], 1)
    with pytest.raises(Ungraded, match="example 'e': several numbers: 3, 4"):
        grade("3 or 4", example("3", grader="number"))


def test_mathematics_is_graded_in_any_thread():
    graded: list[bool | None] = []
    threads = [
        threading.Thread(target=lambda: graded.append(judge_math("x + 1", "1 + x").right)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded == [True] * 4


def test_the_example_names_its_grader():
    assert grade("1,018", example("1018", grader="number"))
    assert grade("(B)", example("cat", grader="choice", choices=("dog", "cat")))
    assert grade("0,0,10,6", example("0,0,10,10", grader="box", iou=0.5))
    assert not grade("0,0,10,6", example("0,0,10,10", grader="box", iou=0.7))
    assert grade("100.4", example("100", grader="number", decimals=0))
    assert grade(r"\frac12", example("0.5", grader="math"))
    assert not any(grade(None, example("5", grader=name, choices=("5", "6"))) for name in GRADERS)
    assert judge(None, example("5")).why == "no answer"
    with pytest.raises(FrankenlensError, match="names the grader 'numbr'.*Did you mean 'number'"):
        judge("5", example("5", grader="numbr"))


@settings(max_examples=50)
@given(st.text(alphabet="ab 1.", max_size=6), st.text(alphabet="ab 1.", max_size=6))
def test_without_a_name_grading_is_exact_as_it_was(answer: str, reference: str):
    grader: Grader = grade
    assert grader(answer, example(reference)) == exact(answer, example(reference))


def test_references_that_no_answer_can_meet_are_found_before_the_work():
    good, bad = example("5", grader="number"), example("bird", grader="choice", choices=("dog", "cat"))
    assert reference_fault(good) == ""
    assert reference_fault(bad) == "the reference 'bird' is none of the options dog, cat"
    require_gradable([good])
    with pytest.raises(FrankenlensError, match="1 of 2 examples cannot be graded"):
        require_gradable([good, bad])
