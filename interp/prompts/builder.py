"""From an example to a prompt: chat template, processor, and a role for every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hooks.errors import FrankenlensError, one_line
from hooks.processors import tokenizer_of
from interp.prompts.pieces import Pieces
from interp.prompts.pixels import Inputs
from interp.prompts.prompt import TOKEN_TENSORS, Prompt
from interp.prompts.question import question_span, question_tokens
from interp.prompts.roles import Role, Trace, TraceFormat
from interp.prompts.scanner import RoleScanner
from interp.questions.examples import Example


class PromptBuilder:
    """Builds prompts with one processor, chat template and trace format.

    Arguments:
        processor: any Hugging Face processor with a tokenizer and images, or the tokenizer of a text-only model.
        trace_format: what delimits reasoning and answer in generated text.
        template: a Jinja chat template to use instead of the processor's own.
        system: a system message put before the question.
        n_logits: how many ids the model has logits for; it may be more than the tokenizer has words.
        instruction: text put before every question, in the same turn; its tokens have the role `template`.

    Attributes:
        text_only: whether it has the tokenizer of a model that sees no images.

    Raises:
        FrankenlensError: no tokenizer, no chat template, or a processor without an image token.
    """

    def __init__(
        self,
        processor: Any,
        trace_format: TraceFormat | None = None,
        template: str | None = None,
        system: str | None = None,
        n_logits: int = 0,
        instruction: str = "",
    ) -> None:
        self.processor, self.system, self.n_logits = processor, system, n_logits
        self.instruction = instruction
        self.tokenizer: Any = tokenizer_of(processor)
        if self.tokenizer is None:
            raise FrankenlensError(
                f"{type(processor).__name__} has no tokenizer; give the model's processor (tokenizer and images), as "
                "AutoProcessor.from_pretrained or hooks.processors.load_processor return it."
            )
        self.template = template or getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if self.template is None:
            raise FrankenlensError(
                f"{type(processor).__name__} has no chat template; give one as PromptBuilder(template=...)."
            )
        self.image_token, self.image_token_id = _image_token(processor, self.tokenizer)
        self.text_only = processor is self.tokenizer
        trace_format = trace_format or TraceFormat()
        if (eos := self.tokenizer.eos_token) and eos not in trace_format.end_of_turn:
            trace_format = replace(trace_format, end_of_turn=(*trace_format.end_of_turn, eos))
        self.trace_format = trace_format

    def with_instruction(self, instruction: str) -> PromptBuilder:
        """The same builder with other text before every question."""
        own = (self.trace_format, self.template, self.system, self.n_logits)
        return PromptBuilder(self.processor, *own, instruction)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn."""
        vocabulary = self.tokenizer.get_vocab()
        return tuple(
            sorted({vocabulary[text] for text in self.trace_format.end_of_turn if text in vocabulary})
        )

    @cached_property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Tokens that no answer holds: image placeholders, chat delimiters, padding, and ids that are no word.

        The ends of a turn and the delimiters of the trace format are not among them.
        """
        added = self.tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special} | {self.image_token_id}
        for name in ("video_token_id", "audio_token_id"):
            if isinstance(index := getattr(self.processor, name, None), int):
                special.add(index)
        delimiters = [token for text in self.trace_format.delimiters for token in self.encode(text)]
        wordless = set(range(self.n_logits)) - self._words
        return tuple(sorted((special | wordless) - set(self.end_ids) - set(delimiters)))

    @cached_property
    def _words(self) -> frozenset[int]:
        """Ids that stand for something."""
        return frozenset(self.tokenizer.get_vocab().values())

    @property
    def pad_id(self) -> int:
        """A token to pad with; what it is does not matter, since it is masked."""
        return next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without anything added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; an id that the tokenizer has no word for is named."""
        pieces, known = [], []
        for index in ids:
            if index in self._words:
                known.append(index)
            else:
                pieces += [self._text(known), f"<id {index}>"]
                known = []
        return "".join([*pieces, self._text(known)])

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def build(self, example: Example, trace: str | Sequence[int] | None = None) -> Prompt:
        """The prompt of an example, followed by a trace (text or token ids) if one is given.

        Raises:
            FrankenlensError: the question is empty, holds the image placeholder or cannot be found again in the
                tokens, or the processor refuses images and text.
        """
        if not example.question.strip():
            raise FrankenlensError(f"example {example.id!r} has an empty question")
        if self.text_only and example.images:
            raise FrankenlensError(
                f"example {example.id!r} has {len(example.images)} images, and this model reads text alone; give "
                "questions without images (of a command: --data)"
            )
        if self.image_token and self.image_token in example.question:
            raise FrankenlensError(
                f"example {example.id!r}: the question holds the image placeholder {self.image_token!r}; leave it out, "
                "the chat template sets one per image"
            )
        text, span = question_span(lambda question: self._render(example, question), example)
        arguments = {"add_special_tokens": not self._has_bos(text)}
        inputs = self._process(example, text, arguments)
        ids = inputs["input_ids"][0].tolist()
        start, end = question_tokens(self.tokenizer, text, span, ids, arguments, example)
        roles: list[Role] = ["image" if i == self.image_token_id else "template" for i in ids]
        for place in range(start, end):
            roles[place] = "question"

        def again() -> dict[str, Tensor]:
            return self._process(example, text, arguments)

        held = Inputs.of(inputs, again, f"example {example.id!r}")
        prompt = Prompt(example, held, tuple(roles), text, len(ids), self)
        trace_ids = self.encode(trace) if isinstance(trace, str) else list(trace or ())
        return self.with_trace(prompt, trace_ids) if trace_ids else prompt

    def with_trace(self, prompt: Prompt, ids: Sequence[int]) -> Prompt:
        """`prompt` with its trace replaced by `ids`.

        Raises:
            FrankenlensError: an id is the image placeholder.
        """
        if self.image_token_id in ids:
            raise FrankenlensError(
                f"prompt {prompt.example.id!r}: the trace holds the image placeholder {self.image_token!r}; suppress "
                "it while generating (interp.pair.generation.greedy does)"
            )
        n = prompt.n_prompt_tokens
        tokens = {}
        for name, value in TOKEN_TENSORS.items():
            if name in prompt.inputs:
                own = prompt.inputs[name]
                tail = torch.tensor([ids if name == "input_ids" else [value] * len(ids)], dtype=own.dtype)
                tokens[name] = torch.cat([own[:, :n], tail], dim=1)
        given = prompt.inputs
        inputs = given.with_tokens(tokens) if isinstance(given, Inputs) else {**given, **tokens}
        roles = self.trace_format.roles(self._pieces(ids), self._reasoning_open(prompt))
        return replace(prompt, inputs=inputs, roles=prompt.roles[:n] + roles)

    def read_trace(self, prompt: Prompt) -> Trace:
        """What the trace of a prompt says."""
        return self.trace_format.parse("".join(self._pieces(prompt.trace_ids)), self._reasoning_open(prompt))

    def scanner(self, prompt: Prompt) -> RoleScanner:
        """Gives the roles of what is written behind a prompt, piece by piece."""
        return RoleScanner(self.trace_format, self._reasoning_open(prompt))

    def _reasoning_open(self, prompt: Prompt) -> bool:
        """Some chat templates open the reasoning themselves: `<|im_start|>assistant <think>`."""
        reasoning = self.trace_format.reasoning
        return reasoning is not None and prompt.prompt_text.rstrip().endswith(reasoning[0])

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        pieces = Pieces(self.decode)
        return [pieces.feed(token) for token in ids]

    def _render(self, example: Example, question: str) -> str:
        images = [{"type": "image"} for _ in example.images]

        def said(text: str, before: list[dict[str, Any]]) -> Any:
            return text if self.text_only else [*before, {"type": "text", "text": text}]

        messages = [{"role": "user", "content": said(self.instruction + question, images)}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": said(self.system, [])})
        try:
            return self.processor.apply_chat_template(  # type: ignore[return-value]
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # Jinja's own, what the template raises, what its sandbox refuses
            raise FrankenlensError(
                f"example {example.id!r}: the chat template cannot be filled in: {one_line(error)}. Give another: "
                "template= (of a command: --template)."
            ) from error

    def _has_bos(self, text: str) -> bool:
        """The template wrote the beginning-of-sequence token itself, so the tokenizer must not add another."""
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    def _process(self, example: Example, text: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
        images = {"images": [list(example.images)]} if example.images else {}
        try:
            encoded = self.processor(text=[text], **images, **arguments, return_tensors="pt")
        except (FrankenlensError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # each processor raises its own
            raise FrankenlensError(
                f"example {example.id!r}: {type(self.processor).__name__} refuses its {len(example.images)} images "
                f"and text: {one_line(error)}"
            ) from error
        inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        if "token_type_ids" in inputs and not inputs["token_type_ids"].any():
            del inputs["token_type_ids"]  # a tokenizer's habit; decoder models do not take it
        if "image_grid_thw" in inputs and "mm_token_type_ids" not in inputs:
            # without it the multimodal positions silently become one-dimensional
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token_id).long()
        return inputs


def _image_token(processor: Any, tokenizer: Any) -> tuple[str, int]:
    if processor is tokenizer and getattr(tokenizer, "image_token", None) is None:
        return "", -1  # a text-only model has none
    for owner in (processor, tokenizer):
        token, index = getattr(owner, "image_token", None), getattr(owner, "image_token_id", None)
        if index is None and token is not None:
            index = tokenizer.convert_tokens_to_ids(str(token))
        if index is not None:
            return str(token or tokenizer.convert_ids_to_tokens(index)), int(index)
    raise FrankenlensError(
        f"{type(processor).__name__} names no image token (`image_token`, `image_token_id`), so the positions of the "
        "image cannot be told; set processor.image_token_id to the id of the placeholder."
    )
