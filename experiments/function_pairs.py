"""What functional localization asks: pairs of images for every visual function, their controls, and questions."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.settings import DataSettings, load_examples
from hooks.errors import FrankenlensError, nearest
from interp.questions.examples import Example
from interp.questions.readers import FUNCTIONS as PAPER_FUNCTIONS
from interp.questions.readers import read_vision_functions
from interp.questions.tasks import TASKS, counterfactual_pairs, neutral_pairs, sample

SYNTHETIC: Mapping[str, str] = {
    "count": "counting",
    "exists": "recognition",
    "colour_at": "colour at a place",
    "shape_at": "shape at a place",
}
"""Synthetic task to the visual function it asks for: how many; is it there; what colour, what shape is where."""
SELF = 8  # pairs a function that are swapped with themselves: whatever happens there is 0 or a fault

Pairs = list[tuple[Example, Example]]


@dataclass(frozen=True)
class FunctionPairs:
    """What is asked; `task` of every example names its function.

    Attributes:
        pairs: (target, source): one question about two images.
        controls: by name, pairs in which no answer should be taken over: "same answer", "itself".
        questions: what the ablations are scored on.
        free: the data asks for free text: the answer is all that a model writes.
        left_out: reason to number of rows, or targets of a control, left out.
        notes: what holds of the data as a whole.
    """

    pairs: Pairs
    controls: Mapping[str, Pairs] = field(default_factory=dict)
    questions: Sequence[Example] = ()
    free: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def examples(self) -> list[Example]:
        """All of them, of pairs, controls and questions."""
        pairs = [*self.pairs, *(pair for some in self.controls.values() for pair in some)]
        return [*(example for pair in pairs for example in pair), *self.questions]


def require_functions(data: Path | None, functions: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse names that the data does not have.

    Raises:
        FrankenlensError: says which there are.
    """
    if data is not None and data.is_file() and functions:
        raise FrankenlensError(f"--functions names pairs of images; {data} is a file of single questions.")
    known = list(SYNTHETIC) if data is None else list(PAPER_FUNCTIONS)
    for given, choices, option in (
        *((name, known, "functions") for name in functions),
        *((name, list(TASKS), "tasks") for name in tasks),
    ):
        if given not in choices:
            hint = nearest(given, choices)
            raise FrankenlensError(
                f"--{option} has {given!r}; choose of {', '.join(choices)}. {hint}".strip()
            )


def load_function_pairs(
    config: DataSettings, functions: Sequence[str], tasks: Sequence[str], seed: int, distinct: bool
) -> FunctionPairs:
    """Pairs of the synthetic functions, of the paper's folders, or, of a JSONL file, questions alone.

    Args:
        config: `n` is per function.
        functions: which; all there are where none is named.
        tasks: synthetic tasks whose questions the ablations are scored on as well.
        seed: of the synthetic ones.
        distinct: see `interp.questions.readers.read_vision_functions`.

    Raises:
        FrankenlensError: the data cannot be read.
    """
    more = [example for task in tasks for example in sample(task, config.n, seed, "map")]
    if config.data is None:
        return _synthetic(functions or list(SYNTHETIC), config.n, seed, more)
    if config.data.is_file():
        examples, left_out = load_examples(config, seed)
        return FunctionPairs([], questions=[*examples, *more], left_out=left_out)
    return _from_folder(config.data, functions or PAPER_FUNCTIONS, config.n, distinct, more)


def _synthetic(tasks: Sequence[str], n: int, seed: int, more: list[Example]) -> FunctionPairs:
    pairs: Pairs = []
    controls: dict[str, Pairs] = {"same answer": [], "itself": []}
    left_out: Counter[str] = Counter()
    for task in tasks:
        own = _named(counterfactual_pairs(task, n, seed), SYNTHETIC[task])
        neutral = _named(neutral_pairs(task, n, seed), SYNTHETIC[task])
        pairs += own
        controls["same answer"] += neutral
        controls["itself"] += [(target, target) for target, _ in own[:SELF]]
        if len(neutral) < len(own):
            left_out[f"{SYNTHETIC[task]}: no image with the same answer for the control"] = len(own) - len(
                neutral
            )
    questions = [target for target, _ in pairs] + more
    return FunctionPairs(pairs, controls, questions, left_out=dict(left_out))


def _from_folder(
    folder: Path, functions: Sequence[str], n: int, distinct: bool, more: list[Example]
) -> FunctionPairs:
    found, reports = read_vision_functions(folder, functions, distinct=distinct)
    pairs: Pairs = []
    own: Pairs = []
    left_out: dict[str, int] = {}
    notes: list[str] = []
    for name, report in reports.items():
        if report.failures or report.notes:
            print(report, file=sys.stderr)
        reasons = Counter(f"{name}: {failure.reason}" for failure in report.failures)
        left_out |= dict(reasons)
        if len(found[name]) > n:
            left_out[f"{name}: rows beyond the first {n} (--n)"] = len(found[name]) - n
        notes += [f"{name}: {note}" for note in report.notes]
        pairs += found[name][:n]
        own += [(target, target) for target, _ in found[name][: min(n, SELF)]]
    questions = [target for target, _ in pairs] + more
    return FunctionPairs(pairs, {"itself": own}, questions, True, left_out, notes)


def _named(pairs: Pairs, function: str) -> Pairs:
    return [(replace(target, task=function), replace(source, task=function)) for target, source in pairs]
