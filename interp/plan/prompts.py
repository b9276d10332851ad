"""Prompts to plan with: of a processor, or no more than stated numbers of tokens; and traces of a stated length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hooks.errors import FrankenlensError
from interp.prompts import Prompt
from interp.prompts.prompt import TOKEN_TENSORS, GivenTokens

SAMPLE = 32
"""Prompts that stand for all of them."""
TEMPLATE = 12
"""Tokens of a chat template where the number of a prompt's tokens alone is stated."""


@dataclass(frozen=True)
class Workload:
    """What is asked, as far as it is known before anything is run.

    Attributes:
        prompts: some of the prompts, before their traces; all others are like them.
        n: how many prompts there are.
        trace_tokens: that each model writes.
        decided: share of the prompts that have a decision.
        at: where in the trace it stands, as a share of its length.
        tries: continuations that are tried on a prompt until a decision is found to be decisive.
        left_out: reason to number of questions that cannot be asked.
    """

    prompts: Sequence[Prompt]
    n: int
    trace_tokens: int
    decided: float = 1.0
    at: float = 0.5
    tries: float = 1.0

    def __post_init__(self) -> None:
        if not self.prompts or not 0 <= self.decided <= 1 or not 0 <= self.at <= 1 or self.tries < 0:
            raise FrankenlensError(
                "a plan takes at least one prompt, shares from 0 to 1 and a number of tries from 0 on; got "
                f"{len(self.prompts)} prompts, decided {self.decided:g}, at {self.at:g}, tries {self.tries:g}"
            )

    @property
    def scale(self) -> float:
        """Prompts that each of those at hand stands for."""
        return self.n / len(self.prompts)

    @property
    def traces(self) -> list[Prompt]:
        """The prompts with all of their traces."""
        return [with_trace(prompt, self.trace_tokens) for prompt in self.prompts]

    @property
    def cut(self) -> list[Prompt]:
        """The prompts up to where decisions are assumed to stand."""
        return [with_trace(prompt, round(self.at * self.trace_tokens)) for prompt in self.prompts]


def with_trace(prompt: Prompt, n: int) -> Prompt:
    """A prompt and n tokens of reasoning, which say nothing."""
    inputs = dict(prompt.inputs)
    for name, value in TOKEN_TENSORS.items():
        if name in inputs:
            own = inputs[name]
            inputs[name] = torch.cat([own, own.new_full((1, n), value)], dim=1)
    return replace(prompt, inputs=inputs, roles=(*prompt.roles, *["reasoning"] * n))


def stated(n: int, tokens: int, image_tokens: int = 0) -> list[Prompt]:
    """Prompts of stated numbers of tokens, all alike but for their words.

    Args:
        n: prompts.
        tokens: of each, those of its image included.
        image_tokens: of its image.

    Raises:
        FrankenlensError: an image of as many tokens as the prompt.
    """
    text = tokens - image_tokens
    if text < 1 or image_tokens < 0:
        raise FrankenlensError(f"a prompt of {tokens} tokens has no room for an image of {image_tokens}")
    around = min(TEMPLATE, text - 1)
    before = around // 2
    roles = ["template"] * before + ["image"] * image_tokens
    roles += ["question"] * (text - around) + ["template"] * (around - before)
    words = torch.full((1, tokens), 2)
    words[:, before : before + image_tokens] = 1
    found = []
    for number in range(n):
        inputs = {"input_ids": words.clone(), "attention_mask": torch.ones_like(words)}
        inputs["input_ids"][0, -1] = 3 + number
        found.append(Prompt.from_inputs(inputs, roles, image_token_id=1, name=f"stated {number}"))
    return found


class _Ended(GivenTokens):
    """What stands behind a trace whose answer is said by its roles: nothing is written after it, and nothing read."""

    def scanner(self, prompt: Prompt) -> Any:
        """Says of whatever comes that it is of the answer."""
        return self

    def feed(self, text: str) -> str:
        """The role."""
        return "answer"


def up_to_the_answer(prompt: Prompt, n: int) -> Prompt:
    """A prompt and a trace of n tokens, the last but one of which begins the answer, cut off behind that.

    The tokens before the reasoning and before the answer are delimiters.
    """
    written = max(1, n - 1)
    long = with_trace(prompt, written)
    before = ["reasoning"] * (written - 1)
    if written > 3:
        before[0], before[-1] = "template", "template"
    roles = (*prompt.roles, *before, "answer")
    return replace(long, roles=roles, builder=_Ended(image_token_id=prompt.builder.image_token_id))


def variants_of(prompts: Sequence[Prompt], described: int, in_words: bool = False) -> dict[str, list[Prompt]]:
    """Prompts as the fine-grained metrics ask them, by numbers: with an image, a black one, a description, or none.

    Those without an image are among the prompts, or, where all have one, what is left of them without it.

    Args:
        prompts: some that stand for all.
        described: tokens of a description.
        in_words: whether one stands in the image's place where there is none.
    """
    seen = [prompt for prompt in prompts if "image" in prompt.roles]
    text = [prompt for prompt in prompts if "image" not in prompt.roles]
    more = in_words * described
    for prompt in seen if len(seen) == len(prompts) else ():
        text += stated(1, max(1, len(prompt) - prompt.roles.count("image")) + more)
    longer = [stated(1, len(prompt) + described, prompt.roles.count("image"))[0] for prompt in seen]
    return {"image": seen, "black": seen, "described": longer, "text": text}
