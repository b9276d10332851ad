"""Variants that write together: batch by batch each of them, so that what they have in common is computed once.

The grafts are swapped for every batch, which costs little (references to weights move; a random update is drawn again),
and what is kept is of one batch at a time, however many prompts there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch

from hooks import FrankenlensError, HookedVLM
from hooks.anatomy.watching import has_pixels
from hooks.batches import batched, budget, is_out_of_memory
from hooks.shared import shared
from interp.pair.generation import bytes_of_row, greedy, greedy_batch, rows_by_length, rows_fitting
from interp.prompts import Prompt, PromptBatch, collate
from interp.results.store import Store, fingerprint
from interp.transfer.grafts import Graft, grafted
from interp.transfer.outcomes import Texts
from interp.transfer.prefixes import BLOCKS, Path, Step, common, in_order, path_of, steps
from interp.transfer.replays import Replays, Unsupported, proved


class Writing:
    """Several runs of one model on the same prompts, each with grafts of its own.

    Args:
        recipient, donor: whose weights go where.
        runs: name to what is put in, nothing for the recipient as it is.

    Raises:
        FrankenlensError: as `interp.transfer.grafts.slices_of`.
    """

    def __init__(self, recipient: HookedVLM, donor: HookedVLM, runs: Mapping[str, Sequence[Graft]]) -> None:
        self._vlm, self._donor, self._runs = recipient, donor, runs
        self._paths: dict[str, Path] = {name: path_of(recipient, grafts) for name, grafts in runs.items()}
        self._order = in_order(self._paths)
        self._whole = ""  # why runs share nothing
        self._proved: set[bool] = set()  # that they can: with an image, or without one

    @torch.no_grad()
    def written(
        self,
        texts: Texts,
        keep: Callable[[str], Store | None] = lambda name: None,
        advance: Callable[[int], object] = lambda prompts: None,
    ) -> dict[str, list[list[int]]]:
        """What each run writes: what `greedy` returns of it, in the same batches.

        Args:
            texts: what is written.
            keep: where it is kept what a run of this name writes, batch by batch.
            advance: is told after each batch of each run of how many prompts it is.

        Raises:
            FrankenlensError: memory runs out with one prompt, or is too little for one; of grafts and stores.
        """
        found: dict[str, list[list[int]]] = {name: [[] for _ in texts.prompts] for name in self._order}
        by_length = rows_by_length(texts.prompts)
        size = rows_fitting([self._vlm], texts.prompts, texts.max_new_tokens, texts.batch_size)
        place = {row: at for at, row in enumerate(by_length)}

        def write(rows: Sequence[int]) -> dict[str, list[list[int]]]:
            ids = [list(texts.prompts[row].ids) for row in rows]
            part, of = f"{place[rows[0]]:06d}-{len(rows)}", fingerprint(texts.max_new_tokens, rows, ids)
            stores = {name: keep(name) for name in self._order}
            kept = {name: None if s is None else s.load(part, of) for name, s in stores.items()}
            todo = [name for name in self._order if kept[name] is None]
            for name in self._order:
                if kept[name] is not None:
                    advance(len(rows))
            for name, made in self._batch(texts, rows, todo):
                if (store := stores[name]) is not None:
                    store.save(part, made, of)
                kept[name] = made
                advance(len(rows))
            return {name: made or [] for name, made in kept.items()}

        for rows, each in shared("variants", batched(by_length, size), write):
            for name, made in each.items():
                for row, own in zip(rows, made, strict=True):
                    found[name][row] = list(own)
        return found

    def _batch(
        self, texts: Texts, rows: Sequence[int], todo: Sequence[str]
    ) -> Iterator[tuple[str, list[list[int]]]]:
        """What each of these runs writes in one batch."""
        prompts = [texts.prompts[row] for row in rows]
        replays: Replays | None = None
        if len(todo) > 1 and self._shares(texts):
            replays = Replays(self._vlm, self._spare(texts, len(rows)))
        batch = collate(prompts, "left").to(self._vlm.device) if todo else None
        for step in steps(todo, self._paths):
            grafts = self._runs[step.name]
            with grafted(self._vlm, self._donor, grafts, rounded=True) if grafts else nullcontext():
                made = None if batch is None else self._attempt(batch, texts.max_new_tokens, step, replays)
                if made is None:
                    made = greedy(self._vlm, prompts, texts.max_new_tokens, len(rows))
            yield step.name, made
        if replays is not None and replays.lacked:
            warnings.warn(
                "there is not enough memory to keep all that variants have in common on a batch, so some of it is "
                "computed again for each; the answers are the same. A smaller batch size leaves more room.",
                stacklevel=2,
            )

    def _attempt(
        self, batch: PromptBatch, max_new_tokens: int, step: Step, replays: Replays | None
    ) -> list[list[int]] | None:
        """What one run writes; None where it is to run in smaller batches, and keep nothing."""
        try:
            with nullcontext() if replays is None or self._whole else replays.running(step):
                return greedy_batch(self._vlm, batch, max_new_tokens)
        except Unsupported as error:
            self._say(str(error))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if replays is not None:
            replays.clear()
        return None

    def _shares(self, texts: Texts) -> bool:
        """Whether it is proved that runs can share, on the prompt that the model was opened with where that will do."""
        opening, has_image = self._vlm.opening, any(prompt.has_image for prompt in texts.prompts)
        if not self._whole and not self._proved & {True, has_image}:
            shows_image = has_pixels(opening)
            will_do = bool(opening) and (shows_image or not has_image)
            inputs = opening if will_do else _small(texts.prompts).to(self._vlm.device).inputs
            paths = list(self._paths.values())
            alike = {common(one, two) for at, one in enumerate(paths) for two in paths[at + 1 :]}
            levels = sorted(one - BLOCKS for one in alike if one > BLOCKS)
            self._proved.add(shows_image if will_do else has_image)
            if why := proved(self._vlm, inputs, levels, front=max(alike, default=0) > 0):
                self._say(why)
        return not self._whole

    def _say(self, why: str) -> None:
        self._whole = why
        warnings.warn(
            f"variants run as wholes, without sharing what they have in common, and give the same answers later: "
            f"{type(self._vlm.model).__name__}: {why}",
            stacklevel=2,
        )

    def _spare(self, texts: Texts, n_rows: int) -> int | None:
        """Bytes that may be kept beside a batch that is being written."""
        free = budget(self._vlm)
        if free is None:
            return None
        return max(0, free - n_rows * bytes_of_row(self._vlm, texts.prompts, texts.max_new_tokens))


def _small(prompts: Sequence[Prompt]) -> PromptBatch:
    """Two prompts of unequal length where there are such, one with an image; one where their images do not join."""
    by_length = sorted(prompts, key=lambda prompt: (not prompt.has_image, len(prompt)))
    other = next((one for one in by_length if len(one) > len(by_length[0])), by_length[-1])
    try:
        return collate([by_length[0], other], "left")
    except FrankenlensError:
        return collate(by_length[:1], "left")
