"""One prompt: processor tensors of one row, and the role of every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from hooks.anatomy.watching import has_pixels
from hooks.errors import FrankenlensError
from interp.prompts.roles import ROLES, Trace, TraceFormat
from interp.prompts.scanner import RoleScanner
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


class GivenTokens:
    """What stands behind a prompt that was given as tensors: words where there is a tokenizer, and no chat template."""

    end_ids: tuple[int, ...] = ()
    suppressed_ids: tuple[int, ...] = ()
    trace_format = TraceFormat()

    def __init__(self, tokenizer: Any = None, image_token_id: int = -1) -> None:
        self.processor = self.tokenizer = tokenizer
        self.image_token, self.image_token_id = "", image_token_id

    @property
    def pad_id(self) -> int:
        """A token to pad with; it is masked."""
        own = getattr(self.tokenizer, "pad_token_id", None)
        return own if own is not None else int(self.image_token_id == 0)  # not what stands for an image

    def decode(self, ids: Sequence[int]) -> str:
        """Words where there is a tokenizer, numbers otherwise."""
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(list(ids))

    def _refused(self, *_: Any, **__: Any) -> NoReturn:
        raise FrankenlensError(
            "this prompt was given as tensors (Prompt.from_inputs), so it has no chat template to build, continue or "
            "read it with; give the longer prompt as tensors, or make prompts with PromptBuilder(processor)."
        )

    encode = build = with_trace = read_trace = scanner = _refused


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
    inputs: Mapping[str, Tensor] = field(repr=False)
    roles: tuple[str, ...] = field(repr=False)
    prompt_text: str
    n_prompt_tokens: int
    builder: PromptSource = field(repr=False)

    @classmethod
    def from_inputs(
        cls,
        inputs: Mapping[str, Any],
        roles: Sequence[str] | None = None,
        *,
        image_token_id: int | None = None,
        tokenizer: Any = None,
        name: str = "given",
    ) -> Prompt:
        """A prompt from processor tensors of your own, for pipelines without a chat template or a processor.

        It sweeps, maps and lenses like any other, in batches with others. It cannot be continued by text, and nothing
        in it is read as a trace; roles may say where reasoning and answer are.

        Args:
            inputs: tensors of one prompt as the model's forward takes them, `input_ids` [1, pos] among them; a missing
                `attention_mask` is all ones.
            roles: one of `ROLES` per token; by default image placeholders are `image` and all else is `question`.
            image_token_id: the placeholder of image tokens (`vlm.image_token_id`), where there is one.
            tokenizer: for showing tokens as words; without one they are shown as numbers.
            name: the example's id, by which results are labelled.

        Raises:
            FrankenlensError: more than one row, something else than tensors, tensors of tokens in another shape, roles
                that do not fit the tokens, or an image of which no token is known.

        Example:
            >>> tensors = pair.builder.build(fl.tasks.sample("sum", 1, seed=0, split="map")[0]).inputs
            >>> prompt = fl.Prompt.from_inputs(tensors, image_token_id=pair.in_.image_token_id, name="mine")
            >>> len(prompt), len(prompt.positions("image")), len(prompt.positions("question"))
            (29, 16, 13)
            >>> lens = fl.logit_lens(pair.in_, [prompt], where="decision", top_k=1, progress=False)
            >>> lens["word"].to_numpy()[-1].tolist()  # by number, without a tokenizer
            [['46']]
            >>> fl.Prompt.from_inputs(tensors, ["question"] * 3)
            Traceback (most recent call last):
            ...
            hooks.errors.FrankenlensError: prompt 'given': 3 roles for 29 tokens; give one of image, ... for each token.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            raise FrankenlensError(
                f"prompt {name!r} has no input_ids, so there are no tokens to give roles to; what is given is "
                f"{', '.join(inputs) or 'nothing'}."
            )
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
            shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise FrankenlensError(
                f"input_ids must be [1, pos], one prompt; got {shape}. Call this once for each row."
            )
        held = {key: value for key, value in inputs.items() if value is not None}
        for key, value in held.items():
            if not isinstance(value, Tensor):
                raise FrankenlensError(
                    f"prompt {name!r}: {key} is a {type(value).__name__}; give tensors, as a processor returns them "
                    'with return_tensors="pt".'
                )
            if key in TOKEN_TENSORS and value.shape != ids.shape:
                raise FrankenlensError(
                    f"prompt {name!r}: {key} is {list(value.shape)} and input_ids {list(ids.shape)}; give one number "
                    "per token."
                )
        held.setdefault("attention_mask", torch.ones_like(ids))
        own = _given_roles(name, held, roles, image_token_id)
        source: Any = GivenTokens(tokenizer, -1 if image_token_id is None else image_token_id)
        example = Example(name, (), source.decode(ids[0].tolist()), "")
        return cls(example, held, own, example.question, len(own), source)

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

    @property
    def has_image(self) -> bool:
        """Whether there is an image: tokens that stand for one, or pixels that are attended to."""
        return "image" in self.roles or any("pixel" in name or "patches" in name for name in self.inputs)

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
        """The first n tokens; at least those before the trace, at most all. They keep the roles they have in the whole.

        Raises:
            FrankenlensError: n is outside that range.
        """
        if not self.n_prompt_tokens <= n <= len(self):
            raise FrankenlensError(
                f"cannot truncate prompt {self.example.id!r} to {n} tokens: "
                f"it has {self.n_prompt_tokens} before its trace and {len(self)} in all"
            )
        cut = self.builder.with_trace(self, self.trace_ids[: n - self.n_prompt_tokens])
        return replace(cut, roles=self.roles[:n])


def _given_roles(
    name: str, inputs: Mapping[str, Tensor], roles: Sequence[str] | None, image_token_id: int | None
) -> tuple[str, ...]:
    """A role for every token that was given as a tensor: as they were given, or image and question."""
    tokens = inputs["input_ids"][0].tolist()
    if roles is None:
        if has_pixels(inputs) and image_token_id not in tokens:
            why = (
                "no token is told to stand for it"
                if image_token_id is None
                else f"no token is {image_token_id}"
            )
            raise FrankenlensError(
                f"prompt {name!r} has an image and {why}: give image_token_id (vlm.image_token_id), or roles where no "
                "token stands for an image."
            )
        return tuple("image" if token == image_token_id else "question" for token in tokens)
    choices = f"give one of {', '.join(ROLES)} for each token."
    if len(roles) != len(tokens):
        raise FrankenlensError(f"prompt {name!r}: {len(roles)} roles for {len(tokens)} tokens; {choices}")
    for place, (role, token) in enumerate(zip(roles, tokens, strict=True)):
        if role not in ROLES:
            raise FrankenlensError(f"prompt {name!r}: token {place} has no role {role!r}; {choices}")
        if token == image_token_id and role != "image":
            raise FrankenlensError(
                f"prompt {name!r}: token {place} is the image's placeholder ({token}) and has the role {role!r}; its "
                "role is image."
            )
    return tuple(roles)
