r"""Replies as models write them, each with the verdict that a reader gives: `+` right, `-` wrong.

What a grader leaves ungraded here is named one by one: no reply may be judged the other way, and the others must be
judged.
"""

from __future__ import annotations

import time

import pytest

from interp.questions.examples import Example
from interp.questions.grading import judge

ANIMALS = ("cat", "dog", "bird", "fish")
NUMBERS = {
    "5": (
        "+five|5.0|5th|≈5|about five|There are 5 (five) cats|5 balls (3 red and 2 blue)|√25|**5**|"
        "_5_|５|٥|五个|다섯 개|"
        "Ответ: 5|La réponse est 5|cinco|5 km/h|5°|$5|5 €|x₁ = 5|So 3 + 2 = 5.|not 6 but 5|6. Actually 5.|5, not 6|"
        '{"answer": 5}|答案是6。不对，答案是5。|一共有五只狗。',
        "-fifty|twenty-five|five hundred|5k|5 million|5bn|5½|5²|5!|–5|minus five|not five|more than 5|at most 5|5+|≥ 5|"
        "5 or more|5:2|5 to 7|5π|5√2|五十|第十五|5万|超过5个|不止5个|5 tens|5‰|5e1|no idea",
    ),
    "-2.5": (r"+−2½|-5/2|minus two and a half|$-\frac{5}{2}$|\frac{-5}{2}|–2.5", "-2.5|2½|-25|-2 5/2"),
    "1234.5": ("+1,234.5|1.234,5|1 234,5|1'234.5|$1,234.50", "-1,2345|12,345|1234|1.234.500"),
    "2/3": (r"+⅔|two thirds|two-thirds|4/6|\frac23|三分之二|2 over 3", "-2:3|0.667|2 2/3|3/2|-2/3"),
    "25%": ("+0.25|a quarter|25|百分之二十五|25 percent", "-2.5%|2.5|1/5"),
    "3 cm": ("+3cm|30 mm|0.03 m|3|3 centimeters|3厘米", "-3 m|3 inches|3 cm^2|3 kg"),
    "$5": ("+5 dollars|500 cents|5", "-€5|5 cents"),
    "12:30": ("+12:30|12:30 PM", "-1:30|12.30"),
    "2:3": ("+4:6|2 : 3", "-3:2|2/3"),
    "1": ("+one|There is one.|one cat|1st", "-the red one|twenty-one|one third|one hundred|This one is red"),
}
CHOICES = (
    r"+D|(d)|d.|[D]|**D**|Ｄ|（D）|Ⓓ|Option D|D: fish|D, because it swims|D as it swims|I'd go with D|I think it's D|"
    r"D is correct|The correct option is (D) fish.|\boxed{\text{D}}|\boxed{\textbf{(D)}}|$\mathrm{D}$|"
    r"答案：D。|故选D|选项D|"
    r"D、fish|정답은 D입니다|答えはDです|Die Antwort ist D|La respuesta correcta es D.|The answer is not B. It is D.|"
    r"A, B and C are wrong, so D|neither a cat nor a dog; it is a fish|The answer is B. Wait, no, it's D.|B? No, D.|"
    r"It's a fish.|fish, not bird|D. fish|Answer: B? No. Answer: D|the last option",
    "-B|dog|not D|D is wrong|I would not choose D|It is not a fish but a dog|The answer is D. No wait, B.|E|whale|"
    "none of the above|A fish? No, a dog.",
)
TEXTS = {
    "Dr. Smith": ("+Dr. Smith|The answer is Dr. Smith.|Answer: **Dr. Smith**", "-Dr|Smith|Dr. Jones"),
    "c. 200 BCE": ("+The answer is c. 200 BCE.", "-200 CE"),
    "7 p.m.": ("+The answer is 7 p.m.|7 p.m.", "-7 a.m."),
    "J. R. R. Tolkien": ("+The answer is J. R. R. Tolkien.", "-C. S. Lewis"),
    "STOP": ('+The sign says "STOP".|stop|ＳＴＯＰ', "-GO"),
    "June 20": (r"+\text{June 20}|\boxed{\text{June 20}}", "-June 21"),
}
MATHEMATICS = {
    r"\frac{1}{2}": (
        r"+1/2|0.5|½|\dfrac12|x = \frac{1}{2}|答案是$\frac{1}{2}$。|50\%|one half",
        r"-2|\frac{1}{3}|-\frac12",
    ),
    r"2\sqrt{3}": (r"+2√3|\sqrt{12}|\frac{6}{\sqrt3}|2\sqrt{3}\text{ cm}", r"-3\sqrt2|2|\sqrt3"),
    r"\frac{1}{10^{20}}": (r"+10^{-20}", r"-10^{-21}|0"),
    r"\frac{1}{2004!}": (r"+1/2004!", r"-\frac{1}{2006!}"),
    r"(1, 2)": (r"+\left(1,2\right)|$(1, 2)$", r"-(2,1)|[1,2]|(1,3)"),
    r"[8,2]": (r"+[8, 2]", r"-[9,1]"),
    r"\{-1, 1\}": (r"+\pm 1|1, -1|x=1 \text{ or } x=-1", r"-1|\{1\}"),
    r"[0, \infty)": (r"+x \ge 0|x≥0", r"-x > 0|(0,\infty)"),
    r"x+y=3": (r"+y = 3 - x|2x+2y=6", r"-x-y=3"),
    r"52_8": (r"+52_{8}", r"-52_9|53_8"),
    r"0.\overline{3}": (r"+1/3", r"-0.3"),
    r"\text{Evelyn}": (r"+Evelyn|The answer is Evelyn.", r"-Briana"),
    r"\$18.90": (r"+18.9|$18.90|\$18.9", r"-\$18.09"),
    r"x^2+2x+1": (r"+(x+1)^2|1+2x+x²", r"-(x-1)^2|y^2+2y+1|x^2+2x"),
    r"\infty": (r"+∞", r"-0|-\infty"),
    r"3 \mathrm{~cm}": (r"+3|3cm|30 mm", r"-3 m|5"),
}
BOXES = (
    "+[10, 20, 30, 40]|<|box_start|>(10,20),(30,40)<|box_end|>|"
    '{"x1": 10, "y1": 20, "x2": 30, "y2": 40}|x1=10, x2=30, y1=20, y2=40|{"x": 10, "y": 20, "width": 20, "height": 20}|'
    "The box is [0,0,5,5]. No wait, it is [10,20,30,40].|［10，20，30，40］",
    "-[50, 60, 70, 80]|none",
)


def cases(grader: str, of: dict[str, tuple[str, str]], **meta):
    for reference, groups in of.items():
        example = Example("e", (), "?", reference, meta={"grader": grader, **meta})
        for group in groups:
            kind, replies = group[0], group[1:]
            for reply in replies.replace("<|", "\0").replace("|>", "\1").split("|"):
                reply = reply.replace("\0", "<|").replace("\1", "|>")
                yield pytest.param(reply, example, kind == "+", id=f"{grader} {reference}: {reply}")


EVERY = [
    *cases("number", NUMBERS),
    *cases("choice", {"D": CHOICES}, choices=ANIMALS),
    *cases("text", TEXTS),
    *cases("math", MATHEMATICS),
    *cases("box", {"10,20,30,40": BOXES}, iou=0.9),
]


@pytest.mark.parametrize(("reply", "example", "right"), EVERY)
def test_replies_are_judged_as_a_reader_judges_them(reply: str, example: Example, right: bool):
    found = judge(reply, example)
    assert found.right is right, found


@pytest.mark.parametrize(
    ("reply", "grader", "reference", "why"),
    [
        ("3 or 4", "number", "3", "several numbers: 3, 4"),
        ("1.500", "number", "1500", "may be the same or not"),
        ("3,5", "number", "3.5", "may be the same or not"),
        ("5%", "number", "5", "may be the same or not"),
        ("3x + 1", "number", "3", "several numbers"),
        ("log 3", "number", "3", "is an expression"),
        ("The answer is 5!", "number", "5", "may be the same or not"),
        ("nearly 5", "number", "5", "no exact number"),
        ("много", "number", "5", "no number in the Cyrillic text"),
        ("The answer is 5. Wait, let me recount.", "number", "5", "taken back"),
        ("A or D", "choice", "D", "the answer names 2 options: cat, fish"),
        ("D. dog", "choice", "D", "the answer names 2 options: dog, fish"),
        ("рыба", "choice", "D", "the answer is in Cyrillic letters"),
        ("not A", "choice", "D", "only which option it is not"),
        ("The sign on the left has red letters", "text", "red", "within a longer answer"),
        (r"1, 3, \ldots, 2n-1", "math", r"1, 2, \ldots, n", "more than expressions"),
        ("3.14", "math", r"\pi", "may be the same or not"),
        ("20", "math", r"\text{June 20}", "may be the same or not"),
    ],
)
def test_what_cannot_be_told_is_ungraded_and_says_why(reply: str, grader: str, reference: str, why: str):
    found = judge(reply, Example("e", (), "?", reference, meta={"grader": grader, "choices": ANIMALS}))
    assert found.right is None and why in found.why


@pytest.mark.parametrize("grader", ["number", "choice", "text", "box", "math"])
@pytest.mark.parametrize(
    "reply",
    ["1" * 9000, "(" * 3000, r"\boxed{" * 2000, "-" * 3000 + "1", "There are 3 red and 4 blue. " * 600],
)
def test_what_a_looping_model_writes_is_graded_without_an_error_and_at_once(reply: str, grader: str):
    reference = "1,2,3,4" if grader == "box" else "fish" if grader == "choice" else "7"
    example = Example("e", (), "?", reference, meta={"grader": grader, "choices": ANIMALS})
    started = time.perf_counter()
    assert judge(reply, example).right is not True
    assert time.perf_counter() - started < 20  # a reader that goes back over the text takes minutes
