"""Questions from files: any JSONL, the paper's pairs of images, and public data sets; every row is accounted for."""

from interp.questions.readers.draw import Draw, Seen
from interp.questions.readers.hub import read_gsm8k, read_math500, read_mathvista
from interp.questions.readers.jsonl import Fields, read_jsonl
from interp.questions.readers.report import Failure, ReadReport
from interp.questions.readers.vision_function import FUNCTIONS, read_vision_function, read_vision_functions

__all__ = [
    "FUNCTIONS",
    "Draw",
    "Failure",
    "Fields",
    "ReadReport",
    "Seen",
    "read_gsm8k",
    "read_jsonl",
    "read_math500",
    "read_mathvista",
    "read_vision_function",
    "read_vision_functions",
]
