"""Answers of a model that collapsed: graded, or left with the reason, in time that grows no faster than they do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest

from hooks.errors import FrankenlensError
from interp.questions import Example
from interp.questions.grading import Grade, apart, judge, judge_math, judge_number, judge_text
from interp.questions.grading.magnitude import too_large

_SIGNS = r"! - # * _ ` ~ . , ; : = < > | / \ ^ ( [ { $ 1 0 9 A x é 一 ² ½ √ 1- 1. 1, 1:2 1,000,"
_LATEX = r"\boxed{ \boxed{1} \frac{ \frac"
_MARKS = r"\text{ \sqrt{ \left( \, \( $1 9^ 9^{ <answer> <ans> </answer> #### <think> </think> <b> <sup>"
_WORDS = "<|begin_of_box|> twenty- 二十 百分之 m/s 1% 1! pi sqrt( [1,2,3,4], a.b."
_SPACED = """1 |- |1 ,|1/2 |1 000 |< |the answer is |answer: |I choose |wait |no wait, |A is correct. |so is |not A
|A, |A or |option |one |one and |half a |1 point 1 |1 m |1 to 2 |more than |not more than |x1: 1 |Dr. |a. |red |red,
|because |there is no |answer to """
_LINES = (" ", "\n", "\t", "\n#", "\n- ", "1\n", "answer\n", "\nexplanation:\n", '"a')
UNITS = (
    *f"{_SIGNS} {_LATEX} {_MARKS} {_WORDS}".split(),
    *(f"{unit.strip()} " for unit in _SPACED.split("|")),
    *_LINES,
)
LENGTH = 64_000
GRADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("red", {}),
    "choice": ("red", {"choices": ("red", "blue", "12 cm", "not red")}),
    "number": ("12", {}),
    "box": ("1,2,30,40", {}),
    "math": ("x^2+1", {}),
}
FEW = UNITS[:: max(1, len(UNITS) * len(GRADERS) // int(os.environ.get("FUZZ", "20")))]


def seconds(grader: str, answer: str) -> float:
    reference, meta = GRADERS[grader]
    before = time.process_time()
    found = judge(answer, Example("1", (), "q", reference, meta={"grader": grader, **meta}))
    assert found.right is not None or found.why
    assert len(found.why) < 9000
    return time.process_time() - before


def bomb(unit: str, length: int) -> str:
    return (unit * (length // len(unit) + 1))[:length]


@pytest.mark.parametrize("grader", GRADERS)
@pytest.mark.parametrize("length", [900, 3900, LENGTH])
def test_bombs_take_no_second(grader: str, length: int) -> None:
    seconds(grader, "warm")  # what is imported and compiled once
    assert len(UNITS) >= 100
    for unit in FEW:
        for answer in (bomb(unit, length), f"1{bomb(unit, length)}1"):
            assert seconds(grader, answer) < 1, (unit, length)


@pytest.mark.slow
def test_time_grows_no_faster_than_length() -> None:
    for unit in ("!", "1 ", "\\boxed{", "<answer>", "the answer is ", "not A "):
        short, long = (min(seconds("choice", bomb(unit, n)) for _ in range(2)) for n in (LENGTH, 8 * LENGTH))
        assert long < 0.5 + 16 * short, unit


PROSE = "I see a cat on a mat, and two dogs; 3 + 4 = 7, and half of it is 3.5.\n" * 700  # 50,000 characters


@pytest.mark.parametrize(
    "answer", ["The answer is 12.", r"\boxed{12}", "<answer>12</answer>", "#### 12", "So x = 12."]
)
@pytest.mark.parametrize("grader", ["number", "math", "choice", "text"])
def test_a_long_trace_is_graded_by_its_end(grader: str, answer: str) -> None:
    for reference, right in (("12", True), ("13", False)):
        example = Example("1", (), "q", reference, meta={"grader": grader, "choices": ("12", "13", "7")})
        for text in (
            f"{PROSE}{answer}",
            f"<think>{PROSE}</think>\n{answer}",
            f"{PROSE}</think>{PROSE}{answer}",
        ):
            found = judge(text, example)
            # "So x = 12." does not say that it is the answer; it holds the last number, and the last option
            untold = answer == "So x = 12." and grader in ("math", "text")
            assert found.right in ((right, None) if untold else (right,)), found


@pytest.mark.parametrize(
    "answer",
    ["The answer is 12.", r"\boxed{12}", "<answer>\n12\n</answer>", "<answer> 12 </answer>", "#### 12"],
)
def test_an_answer_that_much_is_said_behind_is_found(answer: str) -> None:
    for lines in (10, 60, 500):
        behind = "The picture shows a cat on a mat, and a dog beside it.\n" * lines
        for place in range(0, 4000, 571):  # wherever the parts that are read begin and end
            text = f"{PROSE}{answer}\n{behind}{'.' * 7 + 'x' * place}"
            assert judge_number(text, "12").right is True, (lines, place)
            assert judge_number(text, "1").right is False
    taken_back = judge_number(f"{PROSE}{answer}\n{behind}Wait, that is wrong.\n{behind}", "12")
    assert taken_back.right is None


def test_what_a_long_text_does_not_say_is_no_answer() -> None:
    assert judge_number(PROSE, "7").right is None
    assert judge_text(f"<think>{PROSE}</think> red", "red").right is True
    never_closed = judge_text(f"<think>{PROSE} the answer is red", "red")
    assert never_closed.right is False
    assert judge_text("!" * LENGTH + "\nThe answer is red.", "red").right is True
    assert judge_number("The answer is " + "1 or " * 300, "1").right is None


TOWERS = (
    "9^{9^{9^9}}",
    "9^{9^{9^{9^{9}}}}",
    "((9^{999})^{999})^{999}",
    "9^9^9^9",
    "2^{100000000}",
    "100000!",
    "((3!)!)!!",
    "(10^9)!",
    "x^{9^{9^9}}",
    "10^{-10^{10}}",
    "e^{9^{9^9}x}",
    "\\binom{1000000000}{500000000}",
    "1" * 5000,
    "9^{9 \\cdot 9^9}",
)
WORKED_OUT = (
    "2^{10}",
    "e^{x^2}",
    "(x+1)^3(x+2)^5",
    "\\frac{12!}{3!4!5!}",
    "x^{100}",
    "2^{2^{3}}",
    "10^{-3}",
    "n!",
)


def test_what_no_computer_works_out_is_told_from_the_text() -> None:
    assert [text for text in TOWERS if not too_large(text)] == []
    assert [text for text in WORKED_OUT if too_large(text)] == []


@pytest.mark.parametrize("text", TOWERS)
def test_towers_are_ungraded_at_once(text: str) -> None:
    judge_math("x", "x")
    before = time.process_time()
    for found in (
        judge_math(text, "x^2 + 1"),
        judge_math(f"\\boxed{{{text}}}", "12"),
        judge_number(text, "12"),
    ):
        assert not found.right
    assert time.process_time() - before < 1.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decimals", 30_000_000),
        ("decimals", -1),
        ("decimals", 1.5),
        ("tolerance", "1e999999999"),
        ("tolerance", 1e999),
        pytest.param("tolerance", 10**5000, id="tolerance-of 5,000 digits"),
        ("tolerance", float("nan")),
        ("iou", 2),
        ("iou", True),
    ],
)
def test_settings_that_are_no_numbers_of_a_grader_are_refused_at_once(name: str, value: Any) -> None:
    grader = "box" if name == "iou" else "number"
    example = Example(
        "1", (), "q", "1,2,3,4" if name == "iou" else "12", meta={"grader": grader, name: value}
    )
    before = time.process_time()
    with pytest.raises(FrankenlensError, match=f"'{name}' must be"):
        judge("12", example)
    assert time.process_time() - before < 1


def test_what_fails_inside_is_ungraded_and_what_is_no_text_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Sequence[Any]:
        raise RecursionError("too deep")

    monkeypatch.setattr("interp.questions.grading.number.mentions", fails)
    found = judge_number("twelve", "12.5")
    assert found == Grade(None, why="it cannot be worked out: RecursionError: too deep")
    for answer in (3, None, b"3"):
        with pytest.raises((FrankenlensError, TypeError)):  # TypeError: of the tests' own type checks
            judge_number(answer, "3")  # type: ignore[arg-type]
    assert judge_number("1" * 399, "2").right is False or judge_number("1" * 399, "2").right is None


# what no alarm interrupts


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_a_process_that_comes_to_no_end_is_ended_and_the_next_answers() -> None:
    assert judge_math("x + 1", "1 + x").right is True
    (worker,) = apart._KEPT
    os.kill(worker._process.pid, signal.SIGSTOP)  # as one that is within a step of years
    found = judge_math("x + 1", "x + 2", timeout=1)
    assert found.right is None and found.why == "it was not worked out within 2.0 s"
    assert worker._process.returncode == -signal.SIGKILL
    assert judge_math("x + 1", "x + 2").right is False
    os.kill(apart._KEPT[0]._process.pid, signal.SIGKILL)  # as the system does where memory runs out
    assert judge_math("x + 1", "1 + x").right in (True, None)
    assert judge_math("x + 1", "1 + x").right is True


def test_a_list_of_slow_parts_takes_no_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart._Worker, "ask", lambda *_: time.sleep(0.2))
    parts = [f"x^{{{n}}}+y" for n in range(3, 40)]
    before = time.monotonic()
    found = judge_math(", ".join(parts), ", ".join(f"2{part}" for part in parts), timeout=1)
    assert found.right is None and "takes too long" in found.why
    assert 2 <= time.monotonic() - before < 5


def test_an_interruption_leaves_no_answer_for_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge_math("x + 1", "1 + x").right is True
    (worker,) = apart._KEPT

    def interrupted(timeout: float) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_said", type("Said", (), {"get": staticmethod(interrupted)}))
    with pytest.raises(KeyboardInterrupt):
        judge_math("x + 1", "x + 1.0001")
    assert judge_math("x + 1", "1 + x").right is True and judge_math("x + 1", "x").right is False


def test_memory_is_limited_in_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    apart._end()
    monkeypatch.setattr(apart, "MEMORY", 1 << 20)  # less than it has by then
    try:
        found = judge_math(r"\frac{(x+1)^{40}}{\sin(y)}", r"\frac{(1+x)^{40}}{\sin(z)}")
        assert found.right is None and found.why
    finally:
        apart._end()
    monkeypatch.undo()
    assert judge_math("(x+1)^2", "x^2+2x+1").right is True
