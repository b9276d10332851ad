"""Greedy generation in batches: the arg max at every step, whatever a checkpoint's own generation settings say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from hooks import FrankenlensError, HookedVLM
from hooks.batches import cache_bytes, fitting, forward_bytes, in_shared_parts
from hooks.vlm import FwdHooks
from interp.prompts import Prompt, PromptBatch, collate
from interp.results.store import Store, begun, fingerprint, part


@torch.no_grad()
def greedy(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = False,
    keep: Store | None = None,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt (and after its trace, if it has one).

    Special tokens that no answer holds (`PromptBuilder.suppressed_ids`) are never chosen. What was written is
    kept, batch by batch, where there is a store to keep it in.

    Returns:
        Token ids per prompt, in the order of `prompts`. The last one ends the turn unless `max_new_tokens` ran out.

    Example:
        >>> examples = fl.tasks.sample("sum", 1, seed=0, split="map")
        >>> (ids,) = fl.greedy(pair.rl, [pair.builder.build(examples[0])], max_new_tokens=8)
        >>> pair.builder.decode(ids)
        '<think> count cross 2 , count green 1'
    """
    written: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return written
    by_length = rows_by_length(prompts)
    place = {row: at for at, row in enumerate(by_length)}

    def write(rows: Sequence[int]) -> list[list[int]]:
        def made() -> list[list[int]]:
            batch = collate([prompts[row] for row in rows], "left")
            return greedy_batch(vlm, batch.to(vlm.device), max_new_tokens)

        return part(keep, f"{place[rows[0]]:06d}-{len(rows)}", made, of(rows))

    def of(rows: Sequence[int]) -> str:
        return fingerprint(max_new_tokens, list(rows), [list(prompts[row].ids) for row in rows])

    def done(rows: Sequence[int]) -> int:
        return begun(keep, f"{place[rows[0]]:06d}", len(rows), lambda n: of(rows[:n]))

    size = rows_fitting([vlm], prompts, max_new_tokens, batch_size)
    with tqdm(total=len(prompts), desc="generate", unit="prompt", disable=not progress) as bar:
        for rows, made in in_shared_parts("generate", by_length, size, write, done):
            for row, ids in zip(rows, made, strict=True):
                written[row] = ids
            bar.update(len(rows))
    return written


def rows_by_length(prompts: Sequence[Prompt]) -> list[int]:
    """Rows in the order in which they are written, so that prompts of like length run together."""
    return sorted(range(len(prompts)), key=lambda row: len(prompts[row]))


def rows_fitting(
    models: Sequence[HookedVLM], prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int
) -> int:
    """Prompts that models write after together, each with a cache of its own.

    Raises:
        FrankenlensError: there is no memory for one prompt.
    """
    what = f"writing {max_new_tokens} tokens"
    sizes = (bytes_of_row(vlm, prompts, max_new_tokens, len(models)) for vlm in models)
    return min(fitting(vlm, batch_size, of_row, what) for vlm, of_row in zip(models, sizes, strict=True))


def bytes_of_row(vlm: HookedVLM, prompts: Sequence[Prompt], max_new_tokens: int, n_models: int = 1) -> int:
    """What writing to the longest of these prompts takes, where so many models do it."""
    width = max(map(len, prompts), default=1) + max_new_tokens
    return forward_bytes(vlm, width) + 2 * n_models * cache_bytes(vlm, width) + 16 * vlm.n_logits


@torch.no_grad()
def greedy_batch(
    vlm: HookedVLM, batch: PromptBatch, max_new_tokens: int = 128, fwd_hooks: FwdHooks = ()
) -> list[list[int]]:
    """What the model writes after each row of a batch, with hooks on during prefill and every step.

    Args:
        vlm: the opened model.
        batch: padded on the left, on its device.
        max_new_tokens: the most that is written.
        fwd_hooks: as in `HookedVLM.generate`.

    Raises:
        FrankenlensError: the batch is padded on the right.
    """
    if batch.padding_side != "left" and len(set(batch.lengths.tolist())) > 1:
        raise FrankenlensError('generation needs left padding: collate(prompts, "left")')
    builder = batch.prompts[0].builder
    settings = {"max_new_tokens": max_new_tokens, "suppress_tokens": list(builder.suppressed_ids) or None}
    with plain_greedy(vlm.model, builder.end_ids, builder.pad_id):
        output = vlm.generate(batch.inputs, fwd_hooks, **settings)
    return [through_end(ids, builder.end_ids) for ids in output[:, batch.roles.shape[1] :].tolist()]


def through_end(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """`ids` up to and including the first that ends the turn."""
    end = next((i + 1 for i, token in enumerate(ids) if token in end_ids), len(ids))
    return list(ids[:end])


@contextmanager
def plain_greedy(model: PreTrainedModel, end_ids: Sequence[int], pad_id: int) -> Iterator[None]:
    """Put aside a checkpoint's generation settings (temperature, repetition penalty, ...), which bend the arg max."""
    own = model.generation_config
    plain = GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=list(end_ids) or None, pad_token_id=pad_id
    )
    try:
        model.generation_config = plain
        yield
    finally:
        model.generation_config = own
