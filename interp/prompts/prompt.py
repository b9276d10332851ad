"""One prompt: processor tensors of one row, and the role of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.prompts.roles import ROLES, RoleScanner, Trace, TraceFormat
from interp.questions.examples import Example

TOKEN_TENSORS = {"input_ids": 0, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}
"""Tensors with one value per token, and the value of a token of generated text."""


@runtime_checkable
class PromptSource(Protocol):
    """What a prompt, and whoever continues it, asks of what built it; `interp.prompts.builder.PromptBuilder` is one."""

    processor: Any
    tokenizer: Any
    image_token: str
    image_token_id: int
    trace_format: TraceFormat

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn."""
        ...

    @cached_property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Special tokens that no answer holds."""
        ...

    @property
    def pad_id(self) -> int:
        """A token to pad with."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without anything added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...

    def build(self, example: Example, trace: str | Sequence[int] | None = None) -> Prompt:
        """The prompt of an example, followed by a trace if one is given."""
        ...

    def with_trace(self, prompt: Prompt, ids: Sequence[int]) -> Prompt:
        """The prompt with its trace replaced."""
        ...

    def read_trace(self, prompt: Prompt) -> Trace:
        """What the trace of a prompt says."""
        ...

    def scanner(self, prompt: Prompt) -> RoleScanner:
        """Gives the roles of what is written behind a prompt, piece by piece."""
        ...


@dataclass(frozen=True, eq=False)
class Prompt:
    """Images and question, and as much of a trace as there is, ready for the model.

    Attributes:
        example: what is asked.
        inputs: the processor's tensors, `input_ids` of shape [1, pos].
        roles: one of `ROLES` per token.
        prompt_text: the rendered chat template, image placeholders not expanded.
        n_prompt_tokens: tokens before the trace.
        builder: what built it; knows the tokenizer and the trace format.

    Example:
        >>> (example,) = fl.tasks.sample("sum", 1, seed=0, split="map")
        >>> prompt = pair.builder.build(example, "<think> count red")
        >>> sorted(set(prompt.roles)), len(prompt.positions("image")), len(prompt.trace_ids)
        (['image', 'question', 'reasoning', 'template'], 16, 3)
    """

    example: Example
    inputs: dict[str, Tensor] = field(repr=False)
    roles: tuple[str, ...] = field(repr=False)
    prompt_text: str
    n_prompt_tokens: int
    builder: PromptSource = field(repr=False)

    def __len__(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def ids(self) -> list[int]:
        """All token ids, prompt and trace."""
        return self.inputs["input_ids"][0].tolist()

    @property
    def trace_ids(self) -> list[int]:
        """Token ids of the trace."""
        return self.ids[self.n_prompt_tokens :]

    @property
    def text(self) -> str:
        """The rendered chat template and the trace."""
        return self.prompt_text + self.builder.decode(self.trace_ids)

    @property
    def trace(self) -> Trace:
        """The trace as its format reads it."""
        return self.builder.read_trace(self)

    def positions(self, role: str) -> Int[Tensor, " n"]:
        """Positions of the tokens of a role, ascending; empty where the prompt has none.

        Raises:
            FrankenlensError: no such role.
        """
        if role not in ROLES:
            raise FrankenlensError(f"no role {role!r}; choose one of {', '.join(ROLES)}")
        return torch.tensor([i for i, own in enumerate(self.roles) if own == role], dtype=torch.long)

    def with_tokens(self, ids: Sequence[int]) -> Prompt:
        """The same prompt with the trace continued by `ids`.

        Raises:
            FrankenlensError: an id is the image placeholder, which stands for pixels that are not there.
        """
        return self.builder.with_trace(self, [*self.trace_ids, *ids])

    def truncated(self, n: int) -> Prompt:
        """The first n tokens; at least those before the trace, at most all.

        Raises:
            FrankenlensError: n is outside that range.
        """
        if not self.n_prompt_tokens <= n <= len(self):
            raise FrankenlensError(
                f"cannot truncate prompt {self.example.id!r} to {n} tokens: "
                f"it has {self.n_prompt_tokens} before its trace and {len(self)} in all"
            )
        return self.builder.with_trace(self, self.trace_ids[: n - self.n_prompt_tokens])
