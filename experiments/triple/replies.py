"""What the triple says: greedy or sampled replies, and how they are read and graded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from experiments.triple.model import ANSWER, END, END_THINK, SPECIAL, THINK
from interp.questions.examples import Example

MAX_REPLY = 16  # tokens; the longest gold reply has 12
BATCH = 250  # prompts per call of `generate`
_REPLY = re.compile(
    rf"(?:{re.escape(THINK)} (?P<chain>(?:(?!{re.escape(THINK)}).)*?) ?{re.escape(END_THINK)} )?"
    rf"{ANSWER} (?P<answer>.+)"
)


@dataclass(frozen=True)
class Reply:
    """A reply, read.

    Attributes:
        text: as decoded, without the end-of-turn token.
        answer: what follows `answer`; None if the reply does not have the declared form.
        chain: what stands between the delimiters of the chain of thought; None if there is none.
    """

    text: str
    answer: str | None
    chain: str | None


def read(text: str) -> Reply:
    """Splits a reply into chain and answer."""
    match = _REPLY.fullmatch(text.strip())
    if match is None:
        return Reply(text.strip(), None, None)
    return Reply(text.strip(), match["answer"], match["chain"])


def suppressed(processor: ProcessorMixin) -> list[int]:
    """Ids never to be generated: a sampled image token would ask the model for an image that is not there."""
    return processor.tokenizer.convert_tokens_to_ids([token for token in SPECIAL if token != END])  # type: ignore[attr-defined]


@torch.inference_mode()
def greedy_replies(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    *,
    start: str = "",
    batch: int = BATCH,
    label: str | None = None,
) -> list[Reply]:
    """Greedy replies, in the order of the examples.

    Args:
        model: on the CPU or one GPU, in eval mode.
        processor: with left padding.
        examples: one image each.
        start: text that the reply is made to begin with, such as `<think>`.
        batch: prompts per call of `generate`.
        label: title of a progress bar; None shows none.
    """
    replies: list[Reply] = []
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    forced = torch.tensor(tokenizer.convert_tokens_to_ids(start.split()), dtype=torch.long)
    for first in tqdm(range(0, len(examples), batch), desc=label, disable=label is None, mininterval=5):
        chunk = examples[first : first + batch]
        encoded: Any = prompts(processor, chunk)
        inputs: dict[str, Any] = dict(encoded.to(model.device))
        for name, value in (("input_ids", forced), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            extra = torch.zeros(len(chunk), len(forced), dtype=torch.long, device=model.device) + value
            inputs[name] = torch.cat([inputs[name], extra.to(inputs[name].dtype)], dim=1)
        n = inputs["input_ids"].shape[1] - len(forced)
        output = model.generate(  # type: ignore[operator]
            **inputs, do_sample=False, max_new_tokens=MAX_REPLY, suppress_tokens=suppressed(processor)
        )
        replies += [read(text) for text in tokenizer.batch_decode(output[:, n:], skip_special_tokens=True)]
    return replies


def prompts(processor: ProcessorMixin, examples: Sequence[Example]):
    """Left-padded model inputs of one user turn per example, ready for the assistant."""
    return processor.apply_chat_template(
        [messages(example) for example in examples],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )


def messages(example: Example) -> list[dict]:
    """The conversation of one example: its images, then its question."""
    content: list[dict] = [{"type": "image", "image": image} for image in example.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": example.question}]}]
