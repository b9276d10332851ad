"""What a model replies to prompts, and whether a reply is whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hooks import HookedVLM
from interp.pair.generation import greedy
from interp.prompts import Prompt
from interp.results.store import Store, under


@dataclass(frozen=True)
class Reply:
    """A reply, read.

    Attributes:
        text: all of it, without special tokens.
        answer: as the trace format reads it; None where it has none.
        cut: why the answer is not whole; "" where it is.
    """

    text: str
    answer: str | None
    cut: str


def replies(
    vlm: HookedVLM,
    prompts: Mapping[int, Prompt],
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = False,
    keep: Store | None = None,
) -> dict[int, Reply]:
    """Greedy replies by row, kept where there is a store; images of shapes that do not join never share a batch."""
    found: dict[int, Reply] = {}
    for number, rows in enumerate(joining(prompts)):
        some, own = [prompts[row] for row in rows], under(keep, str(number))
        found |= replied(prompts, rows, greedy(vlm, some, max_new_tokens, batch_size, progress, own))
    return found


def joining(prompts: Mapping[int, Prompt]) -> list[list[int]]:
    """The rows of prompts that may share a batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in prompts.items():
        groups.setdefault(_shape(prompt), []).append(row)
    return list(groups.values())


def replied(
    prompts: Mapping[int, Prompt], rows: Sequence[int], written: Sequence[Sequence[int]]
) -> dict[int, Reply]:
    """What was written after some rows, read."""
    return {row: _reply(prompts[row], list(ids)) for row, ids in zip(rows, written, strict=True)}


def _shape(prompt: Prompt) -> tuple[int, ...]:
    """What must be equal for `collate` to join two prompts' images."""
    if "pixel_values" not in prompt.inputs:
        return ()
    shape = tuple(prompt.inputs["pixel_values"].shape)
    return shape[-3:] if len(shape) >= 4 else shape[1:]


def _reply(prompt: Prompt, ids: list[int]) -> Reply:
    builder = prompt.builder
    answer = builder.read_trace(prompt.with_tokens(ids)).answer
    form = builder.trace_format.answer
    ended = bool(ids) and ids[-1] in builder.end_ids
    whole = ended or (answer is not None and form is not None and form[1] is not None)
    text = builder.tokenizer.decode(ids, skip_special_tokens=True)
    return Reply(text, answer, "" if whole else f"cut off after {len(ids)} tokens")
