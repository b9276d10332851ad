"""One prompt: processor tensors of one row, and the role of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.prompts.roles import ROLES, Trace
from interp.questions.examples import Example

if TYPE_CHECKING:
    from interp.prompts.builder import PromptBuilder

TOKEN_TENSORS = {"input_ids": 0, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}
"""Tensors with one value per token, and the value of a token of generated text."""


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
    """

    example: Example
    inputs: dict[str, Tensor] = field(repr=False)
    roles: tuple[str, ...] = field(repr=False)
    prompt_text: str
    n_prompt_tokens: int
    builder: PromptBuilder = field(repr=False)

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
