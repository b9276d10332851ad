"""Pairs of images for every visual function, with their controls: synthetic ones, and those of the paper's folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from interp.questions.examples import Example
from interp.questions.readers import read_vision_functions
from interp.questions.tasks import counterfactual_pairs, neutral_pairs

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

    def asking(self, more: Sequence[Example]) -> FunctionPairs:
        """The same with further questions for the ablations."""
        return replace(self, questions=[*self.questions, *more])

    def only(self, examples: Sequence[Example], left_out: Mapping[str, int]) -> FunctionPairs:
        """What there is of these very examples, and why of no others."""
        kept = set(map(id, examples))

        def some(pairs: Pairs) -> Pairs:
            return [pair for pair in pairs if kept.issuperset(map(id, pair))]

        return replace(
            self,
            pairs=some(self.pairs),
            controls={name: some(pairs) for name, pairs in self.controls.items()},
            questions=[example for example in self.questions if id(example) in kept],
            left_out={**self.left_out, **left_out},
        )


def synthetic_pairs(tasks: Sequence[str], n: int, seed: int = 0) -> FunctionPairs:
    """n pairs of every task, beside images with the same answer and the images themselves; the targets as questions.

    Args:
        tasks: of `SYNTHETIC`.
        n: pairs a task.
        seed: of the scenes.
    """
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
            reason = f"{SYNTHETIC[task]}: no image with the same answer for the control"
            left_out[reason] = len(own) - len(neutral)
    return FunctionPairs(pairs, controls, [target for target, _ in pairs], left_out=dict(left_out))


def folder_pairs(
    folder: Path, functions: Sequence[str], n: int, distinct: bool = True, **access: Any
) -> FunctionPairs:
    """The first n pairs of every function of the paper's folders, and the images themselves; the targets as questions.

    Args:
        folder, functions, distinct: as in `interp.questions.readers.read_vision_functions`.
        n: pairs a function.
        access: `images_anywhere` and `max_pixels` of the same.

    Raises:
        FrankenlensError: the folders cannot be read.
    """
    found, reports = read_vision_functions(folder, functions, distinct=distinct, n=n, **access)
    pairs: Pairs = []
    own: Pairs = []
    left_out: dict[str, int] = {}
    notes: list[str] = []
    for name, report in reports.items():
        left_out |= dict(Counter(f"{name}: {failure.reason}" for failure in report.failures))
        left_out |= {f"{name}: rows {reason}": count for reason, count in report.passed.items()}
        notes += [f"{name}: {note}" for note in report.notes]
        pairs += found[name]
        own += [(target, target) for target, _ in found[name][: min(n, SELF)]]
    questions = [target for target, _ in pairs]
    return FunctionPairs(pairs, {"itself": own}, questions, True, left_out, notes)


def _named(pairs: Pairs, function: str) -> Pairs:
    return [(replace(target, task=function), replace(source, task=function)) for target, source in pairs]
