"""What is asked: every example with its image, with a black one, with a description, or without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from PIL import Image

from hooks.errors import FrankenlensError
from interp.fine_grained.descriptions import MODEL, TEMPLATE, Describe, require_known, with_descriptions
from interp.prompts import Prompt, PromptBuilder
from interp.questions.examples import Example
from interp.questions.grading import require_gradable
from interp.questions.on_demand import Images, OnDemand

NEEDS: Mapping[str, tuple[str, ...]] = {
    "vis": ("image", "black"),
    "v2r": ("image", "described"),
    "rea": ("text",),
}
"""Metric to the variants it compares."""
VARIANTS = ("image", "black", "described", "text")
METRICS = tuple(NEEDS)
PAPER: Mapping[str, str] = {
    "vis": "mathvista:general-vqa",
    "v2r": "mathvista:math-targeted-vqa",
    "rea": "math-500",
}
"""The data of each metric in the paper, greedy, `PAPER_N` examples each."""
PAPER_N = 100
NO_IMAGE, HAS_IMAGE = "the problem has no image", "the problem has an image"
APART = (NO_IMAGE, HAS_IMAGE)
"""Reasons for which an example does not belong to a variant at all; any other one counts as left out."""


@dataclass(frozen=True, eq=False)
class Questions:
    """Prompts of every variant, made once so that every model gets the same ones.

    Attributes:
        examples: with their descriptions.
        variants: those that are asked.
        prompts: variant to row to prompt.
        why: variant to the reason of each row that has none, "" where it has one.
        template: of problem and description.
    """

    examples: tuple[Example, ...]
    variants: tuple[str, ...]
    prompts: Mapping[str, Mapping[int, Prompt]] = field(repr=False)
    why: Mapping[str, Sequence[str]] = field(repr=False)
    template: str = TEMPLATE


def questions(
    builder: PromptBuilder,
    examples: Sequence[Example],
    *,
    describe: Describe | None = None,
    template: str = TEMPLATE,
    metrics: Sequence[str] = METRICS,
) -> Questions:
    """The prompts that the metrics need.

    Args:
        builder: makes them.
        examples: problems with or without images; `meta["grader"]` as in `interp.questions.grading`.
        describe: a function of an example; None: `meta["description"]`.
        template: of the problem with its description, with {description} and {question}.
        metrics: of `METRICS`.

    Raises:
        FrankenlensError: no examples, an unknown metric, a template without its places, references that cannot be
            graded, or no example that any metric can be measured on.
    """
    require_askable(examples, template, metrics)
    variants = tuple(v for v in VARIANTS if any(v in NEEDS[metric] for metric in metrics))
    if describe is not None and "described" in variants:
        examples = with_descriptions(examples, describe)
    _require_descriptions(examples, variants)
    made = {variant: _prompts(builder, examples, variant, template) for variant in variants}
    prompts = {variant: some for variant, (some, _) in made.items()}
    why = {variant: reasons for variant, (_, reasons) in made.items()}
    if not any(prompts.values()):
        first = next(iter(dict.fromkeys(reason for reasons in why.values() for reason in reasons)))
        raise FrankenlensError(
            f"none of {len(examples)} examples can be asked for {', '.join(metrics)}: {first}"
        )
    return Questions(tuple(examples), variants, prompts, why, template)


def require_askable(examples: Sequence[Example], template: str, metrics: Sequence[str]) -> None:
    """Refuse what cannot be measured, before anything runs.

    Raises:
        FrankenlensError: no examples, an unknown metric, a template without its places, or references that cannot be
            graded.
    """
    if not examples:
        raise FrankenlensError("the fine-grained metrics need at least one example")
    if not metrics or not set(metrics) <= set(METRICS):
        raise FrankenlensError(f"the metrics are {', '.join(METRICS)}, not {', '.join(metrics) or 'none'}")
    if "{description}" not in template or "{question}" not in template:
        raise FrankenlensError(
            f"the template {template!r} must have the places {{description}} and {{question}}"
        )
    require_gradable(examples)


def _require_descriptions(examples: Sequence[Example], variants: Sequence[str]) -> None:
    seen = [example for example in examples if example.images]
    if "described" in variants and seen and not any(example.meta.get("description") for example in seen):
        why = next(
            (example.meta["no_description"] for example in seen if "no_description" in example.meta), ""
        )
        raise FrankenlensError(
            f"none of the {len(seen)} examples with images has a description, which v2r needs"
            f"{f' ({why})' if why else ''}: put one into meta['description'], give describe=, a function of an "
            f"example, or describe={MODEL!r} to ask the model itself, or leave v2r out of metrics="
        )


def _prompts(
    builder: PromptBuilder, examples: Sequence[Example], variant: str, template: str
) -> tuple[dict[int, Prompt], list[str]]:
    """Row to prompt of a variant, and per row why there is none."""
    prompts: dict[int, Prompt] = {}
    why = [""] * len(examples)
    for row, example in enumerate(examples):
        if bool(example.images) == (variant == "text"):
            why[row] = HAS_IMAGE if example.images else NO_IMAGE
            continue
        try:
            prompts[row] = builder.build(_asked(builder, example, variant, template))
        except (FrankenlensError, ValueError) as error:
            why[row] = str(error)
    return prompts, why


def _asked(builder: PromptBuilder, example: Example, variant: str, template: str) -> Example:
    """An example as a variant asks it."""
    question, images = example.question, example.images
    if variant == "described":
        description = example.meta.get("description")
        if not description:
            because = example.meta.get("no_description", "")
            raise FrankenlensError(f"no description{f': {because}' if because else ''}")
        require_known(builder, template.format(description=description, question=""))
        question = template.format(description=description, question=question)
    if variant in ("black", "described"):
        images = Images([_black(image.size) for image in images])
    if example.meta.get("in_words"):
        require_known(builder, question)
    return replace(example, question=question, images=images)


@lru_cache(maxsize=1024)
def _black(size: tuple[int, int]) -> OnDemand:
    """A black image, which is there while it is used: thousands of those of 12 megapixels are a terabyte."""
    return OnDemand(partial(Image.new, "RGB", size), Image.new("RGB", size), f"black, {size[0]} x {size[1]}")


def described_by(example: Example) -> str:
    """Where an example's description comes from: "data", "callable", "model", or "" where it has none."""
    return str(example.meta.get("described_by") or ("data" if example.meta.get("description") else ""))
