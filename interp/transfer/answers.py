"""The metric "is the greedy answer right?"."""

from __future__ import annotations

from collections.abc import Sequence

from hooks import FrankenlensError
from hooks.extras import MissingPackage
from interp.localization.outcomes import Grader
from interp.prompts import Prompt, PromptBuilder
from interp.questions.examples import Example, cluster_of
from interp.questions.grading import Ungraded, grade
from interp.transfer.outcomes import Ids, OfTexts, Outcomes, Texts

NO_ANSWER = "no answer can be read"


def answers(
    builder: PromptBuilder,
    examples: Sequence[Example],
    *,
    grader: Grader = grade,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> OfTexts:
    """The metric "is the greedy answer right?".

    Prompts are built once, so that every variant gets the same ones. A prompt that cannot be built, or a grader that
    cannot tell, has no value, and `transfer` says what becomes of it; an answer that is not there is wrong, as it is
    for the user.

    Raises:
        FrankenlensError: no examples, or none that a prompt can be made of.
    """
    prompts: dict[int, Prompt] = {}
    unbuilt = [""] * len(examples)
    for row, example in enumerate(examples):
        try:
            prompts[row] = builder.build(example)
        except FrankenlensError as error:
            unbuilt[row] = str(error)
    if not prompts:
        raise FrankenlensError(f"no prompt can be made: {unbuilt[0] if unbuilt else 'there are no examples'}")

    clusters = tuple(cluster_of(example) for example in examples)

    def read(written: Sequence[Ids]) -> Outcomes:
        right, why = [float("nan")] * len(examples), list(unbuilt)
        for (row, prompt), ids in zip(prompts.items(), written[0], strict=True):
            answer = builder.read_trace(prompt.with_tokens(ids)).answer
            if answer is None:
                cut_off = len(ids) == max_new_tokens and ids[-1] not in builder.end_ids
                why[row] = f"{NO_ANSWER}: cut off at {max_new_tokens} tokens" if cut_off else NO_ANSWER
            try:
                right[row] = float(grader(answer, prompt.example))
            except Ungraded as error:
                why[row] = str(error)
            except MissingPackage:
                raise
            except Exception as error:  # a grader may be the user's code
                why[row] = f"the grader failed: {type(error).__name__}: {error}"
        ids, tasks = zip(*((example.id, example.task) for example in examples), strict=True)
        return Outcomes(ids, tasks, tuple(right), tuple(why), clusters)

    return OfTexts((Texts(tuple(prompts.values()), max_new_tokens, batch_size),), read)
