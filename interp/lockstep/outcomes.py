"""Examples made into prompts, and what was written after them graded; whatever fails is kept with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hooks import FrankenlensError, HookedVLM
from hooks.extras import MissingPackage
from interp.localization.outcomes import Grader
from interp.lockstep.refusals import require_fits
from interp.lockstep.run import Written
from interp.prompts import Prompt, PromptBuilder
from interp.questions.examples import Example
from interp.questions.grading import Ungraded


@dataclass(frozen=True)
class Questions:
    """The prompts that can be run, by row, and why the other rows cannot."""

    examples: tuple[Example, ...]
    prompts: dict[int, Prompt]
    why: tuple[str, ...]

    @property
    def rows(self) -> list[int]:
        """Rows that run."""
        return list(self.prompts)

    @property
    def runnable(self) -> list[Prompt]:
        """Their prompts."""
        return list(self.prompts.values())


def questions(
    builder: PromptBuilder, examples: Sequence[Example], vlm: HookedVLM, max_new_tokens: int
) -> Questions:
    """Prompts of the examples; one that cannot be built or is too long is left out with the reason.

    Raises:
        FrankenlensError: none is left.
    """
    prompts: dict[int, Prompt] = {}
    why = [""] * len(examples)
    for row, example in enumerate(examples):
        try:
            prompt = builder.build(example)
            require_fits(vlm, [prompt], max_new_tokens)
            prompts[row] = prompt
        except FrankenlensError as error:
            why[row] = str(error).removeprefix("row 0 ")
    if not prompts:
        raise FrankenlensError(f"no prompt can be run: {why[0] if why else 'there are no examples'}")
    return Questions(tuple(examples), prompts, tuple(why))


def graded(written: Written, grader: Grader) -> tuple[float, str]:
    """1 or 0, and what is wrong with the form; NaN and the reason where the grader cannot read the answer.

    An answer that is not there is wrong, as it is for the user.
    """
    try:
        return float(grader(written.answer, written.prompt.example)), written.why
    except Ungraded as error:
        return float("nan"), str(error)
    except MissingPackage:
        raise
    except Exception as error:  # a grader may be the user's code
        return float("nan"), f"the grader failed: {type(error).__name__}: {error}"
