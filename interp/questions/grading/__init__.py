"""Is an answer right? Read from free text, compared by a rule that the example names, never silently wrong.

`judge` gives a `Grade`: right, wrong, or ungraded with the reason (the reference cannot be read, the comparison timed
out, the answer commits itself to no single value). `grade` gives a plain bool for whatever takes a
`interp.localization.outcomes.Grader`, and raises `Ungraded` where there is none to give.
"""

from interp.questions.grading.box import iou, judge_box
from interp.questions.grading.choice import judge_choice
from interp.questions.grading.grade import Grade, Ungraded
from interp.questions.grading.judge import GRADERS, grade, judge, reference_fault, require_gradable
from interp.questions.grading.mathematics import judge_math
from interp.questions.grading.number import judge_number
from interp.questions.grading.statement import extract
from interp.questions.grading.words import judge_exact, judge_text

__all__ = [
    "GRADERS",
    "Grade",
    "Ungraded",
    "extract",
    "grade",
    "iou",
    "judge",
    "judge_box",
    "judge_choice",
    "judge_exact",
    "judge_math",
    "judge_number",
    "judge_text",
    "reference_fault",
    "require_gradable",
]
