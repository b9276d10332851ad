"""Where descriptions of images come from: a function, or a model's own words; never a paid service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hooks import FrankenlensError, HookedVLM
from interp.fine_grained.replies import replies
from interp.prompts import Prompt, PromptBuilder
from interp.questions.examples import Example
from interp.results.store import Store

REQUEST = "Describe the image in detail: every object, number, word and relation that can be seen."
MODEL = "model"
TEMPLATE = "Description of the image: {description}\n\n{question}"
"""Where a description goes; for the embedded models "{description} , {question}"."""
Describe = Callable[[Example], str]


def with_descriptions(examples: Sequence[Example], describe: Describe) -> list[Example]:
    """The examples with `meta["description"]` as `describe` gives it, where they have images.

    An example that it fails on keeps none, and the reason in `meta["no_description"]`.
    """
    out = []
    for example in examples:
        if not example.images:
            out.append(example)
            continue
        try:
            out.append(_described(example, describe(example), "callable"))
        except Exception as error:  # a user's function: whatever it raises is this example's reason
            out.append(_undescribed(example, f"{type(error).__name__}: {error}"))
    return out


def described_by_model(
    vlm: HookedVLM,
    builder: PromptBuilder,
    examples: Sequence[Example],
    *,
    request: str = REQUEST,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: bool = True,
    keep: Store | None = None,
) -> list[Example]:
    """The examples with `meta["description"]` in the words of a model that is shown the images and not the question.

    The description is the answer of its reply, or the whole reply where its form has none. Replies are kept where there
    is a store.

    Raises:
        FrankenlensError: the tokenizer does not know the words of the request.
    """
    require_known(builder, request)
    prompts: dict[int, Prompt] = {}
    out = list(examples)
    for row, example in enumerate(examples):
        if example.images:
            try:
                prompts[row] = builder.build(replace(example, question=request))
            except FrankenlensError as error:
                out[row] = _undescribed(example, str(error))
    for row, reply in replies(vlm, prompts, max_new_tokens, batch_size, progress, keep).items():
        out[row] = _described(examples[row], reply.answer or reply.text, MODEL)
    return out


def in_words(example: Example, template: str = TEMPLATE) -> Example:
    """The example as a problem without an image: its description stands before the question.

    Not the paper's text-only problems, but the nearest that data with images has; say so where you report it.

    Raises:
        FrankenlensError: it has no description.

    Example:
        >>> examples = fl.with_descriptions(fl.tasks.sample("exists", 1, seed=0, split="map"), fl.tasks.describe_scene)
        >>> fl.in_words(examples[0], "{description} , {question}").question.split(" , ")[-2:]
        ['c4 yellow triangle', 'is there a yellow square ?']
    """
    text = example.meta.get("description")
    if not text:
        raise FrankenlensError(f"example {example.id!r} has no description to stand for its image")
    question = template.format(description=text, question=example.question)
    meta = {**example.meta, "in_words": True}
    return replace(example, id=f"{example.id}-in-words", images=(), question=question, meta=meta)


def require_known(builder: PromptBuilder, text: str) -> None:
    """Refuse text with words that the tokenizer has no token for: the model would not see them.

    Raises:
        FrankenlensError: names them.
    """
    unknown = builder.tokenizer.unk_token_id
    if unknown is not None and unknown in builder.encode(text):
        words = [word for word in dict.fromkeys(text.split()) if unknown in builder.encode(word)]
        raise FrankenlensError(
            f"the tokenizer does not know {', '.join(map(repr, words[:5]))} of {text[:60]!r}"
        )


def _described(example: Example, text: str, by: str) -> Example:
    if not isinstance(text, str) or not text.strip():
        return _undescribed(example, f"an empty description: {text!r}")
    return replace(example, meta={**example.meta, "description": text.strip(), "described_by": by})


def _undescribed(example: Example, why: str) -> Example:
    meta = {key: value for key, value in example.meta.items() if key != "description"}
    return replace(example, meta={**meta, "no_description": why})
