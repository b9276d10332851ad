"""The traces that routes are cut in: what a model writes greedily, up to the first token of its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from hooks import HookedVLM
from interp.knockout.routes import up_to_the_answer
from interp.localization.outcomes import Grader
from interp.pair.elsewhere import Traces
from interp.pair.generation import greedy
from interp.prompts import Prompt, PromptBuilder
from interp.questions.examples import Example
from interp.questions.grading import Ungraded, grade

Fault = Callable[[Prompt], str]
"""Why a trace that has an answer is left out; "" where it is not."""


def answered_traces(
    vlm: HookedVLM,
    builder: PromptBuilder,
    examples: Sequence[Example],
    *,
    fault: Fault | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = True,
    given: Traces | None = None,
) -> tuple[list[Prompt], Counter[str]]:
    """A model's greedy traces up to the first token of the answer, as `interp.knockout.routes` reads them.

    Args:
        vlm: the model that writes.
        builder: makes its prompts.
        examples: what is asked.
        fault: which of the traces with an answer are left out, e.g. `wrong()`; by default none.
        max_new_tokens, batch_size, progress: as everywhere.
        given: its traces, where they were written elsewhere (`interp.pair.elsewhere`).

    Returns:
        The traces, and reason to number of those that are left out.
    """
    asked = [builder.build(example) for example in examples]
    written = greedy(vlm, asked, max_new_tokens, batch_size, progress) if given is None else given.of(asked)
    kept: list[Prompt] = []
    left_out: Counter[str] = Counter()
    for prompt, ids in zip(asked, written, strict=True):
        whole = prompt.with_tokens(ids)
        cut, why = up_to_the_answer(whole)
        if cut is not None and fault is not None:
            why = fault(whole)
        if cut is None or why:
            left_out[why] += 1
        else:
            kept.append(cut)
    return kept, left_out


def wrong(grader: Grader = grade) -> Fault:
    """For `answered_traces`: leave out what the grader calls wrong, or cannot grade."""

    def fault(trace: Prompt) -> str:
        try:
            return "" if grader(trace.trace.answer, trace.example) else "the answer is wrong"
        except Ungraded as error:
            return f"the answer cannot be graded: {error}"

    return fault
