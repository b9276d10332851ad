"""Lockstep generation: donor and recipient read the same tokens, and the recipient, with some of the donor's
activations in it, chooses the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import HookedVLM
from hooks.batches import in_shared_parts
from interp.lockstep.cached import CachedModel
from interp.lockstep.intervention import Intervention
from interp.lockstep.moved import Moved
from interp.lockstep.places import Places
from interp.lockstep.refusals import require_fits, require_sound
from interp.lockstep.sampling import Chooser, Sampling
from interp.lockstep.transplant import Transplant
from interp.pair.generation import rows_fitting
from interp.prompts import Prompt, PromptBatch, collate
from interp.results.store import Store, begun, fingerprint, part

_CROWDED = 0.75  # finished rows are kept in the batch until fewer than this share of it is still written


@dataclass(frozen=True)
class Written:
    """What came of one prompt.

    Attributes:
        prompt: the prompt with what was written after it.
        tokens: that alone; the last one ends the turn unless `max_new_tokens` ran out.
        text: as text.
        answer: as the trace format reads it; None where there is none.
        parsed: the trace is as its format wants it.
        why: what is wrong with its form, or that it was cut off; "" where it is sound.
        n_moved: tokens at which each `Moved` acted.
        donor_choices: what the donor would have written at each step, on the same tokens.
        divergence: the first step at which the donor and the recipient as it ran would have chosen differently.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    text: str = field(repr=False)
    answer: str | None
    parsed: bool
    why: str
    n_moved: tuple[int, ...]
    donor_choices: tuple[int, ...] = field(repr=False)
    divergence: int | None = None


@torch.no_grad()
def lockstep(
    donor: HookedVLM,
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    moved: Moved | Sequence[Moved] = (),
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    progress: bool = False,
    keep: Store | None = None,
) -> list[Written]:
    """What the recipient writes with the donor's activations in it, both reading the same tokens, each with its cache.

    At every step the donor runs first, unchanged; then the recipient, in which the components take the donor's
    activations at the tokens named. So the recipient's cache holds the states that they led to, the donor's its own.

    Args:
        donor, recipient: two models of one architecture (or one model twice).
        prompts: from one builder; a trace that they hold is part of what is given.
        moved: what is moved and when; nothing: the recipient's own generation.
        max_new_tokens: the most that is written.
        sampling: None for greedy.
        batch_size: prompts that run together.
        progress: a bar.
        keep: where it is kept what is written, batch by batch; one for each donor, recipient and `moved`.

    Returns:
        One per prompt, in their order.

    Raises:
        FrankenlensError: before anything runs: the models' next-token distributions differ in size, a prompt with what
            may be written does not fit the context, a component does not exist, or a role is empty in a prompt.
    """
    moved = [moved] if isinstance(moved, Moved) else list(moved)
    require_sound(donor, recipient, prompts, moved, max_new_tokens)

    def start(batch: PromptBatch, chooser: Chooser, rows: Sequence[int]) -> Run:
        places = Places(batch, moved)
        return Run(
            recipient, donor, batch, Transplant(donor, recipient, moved, places), places, chooser, rows
        )

    models, bar = (recipient, donor), "lockstep" if progress else ""
    return write_all(models, prompts, start, max_new_tokens, sampling, batch_size, bar, keep)


@torch.no_grad()
def alone(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    progress: bool = False,
    keep: Store | None = None,
) -> list[Written]:
    """What a model writes by itself, chosen as in `lockstep` (a seeded row draws the same); arguments as there.

    Raises:
        FrankenlensError: as `lockstep`.
    """
    require_fits(vlm, prompts, max_new_tokens)

    def start(batch: PromptBatch, chooser: Chooser, rows: Sequence[int]) -> Run:
        return Run(vlm, None, batch, Intervention(), Places(batch, ()), chooser, rows)

    bar = "generate" if progress else ""
    return write_all((vlm,), prompts, start, max_new_tokens, sampling, batch_size, bar, keep)


Start = Callable[[PromptBatch, Chooser, Sequence[int]], "Run"]


def write_all(
    models: Sequence[HookedVLM],
    prompts: Sequence[Prompt],
    start: Start,
    max_new_tokens: int,
    sampling: Sampling | None,
    batch_size: int,
    bar: str = "",
    keep: Store | None = None,
) -> list[Written]:
    """Write after every prompt, prompts of similar length together, and as many as there is memory for.

    Args:
        models: that run.
        prompts: from one builder.
        start: makes the run of a batch.
        max_new_tokens, sampling, batch_size: as in `lockstep`.
        bar: name of a progress bar; "" for none.
        keep: as in `lockstep`.
    """
    if not prompts:
        return []
    found: dict[int, Written] = {}
    chooser = Chooser(prompts, sampling, max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))

    place = {row: number for number, row in enumerate(by_length)}

    def of(rows: Sequence[int]) -> str:
        ids = [list(prompts[row].ids) for row in rows]
        return fingerprint(max_new_tokens, sampling, list(rows), ids)

    def written(rows: Sequence[int]) -> list[dict[str, Any]]:
        some = [prompts[row] for row in rows]

        def write() -> list[dict[str, Any]]:
            run = start(collate(some, "left"), chooser, rows)
            run.write(max_new_tokens)
            return [_plain(run.result(i, max_new_tokens)) for i in range(len(rows))]

        return part(keep, f"{place[rows[0]]:06d}-{len(rows)}", write, of(rows))

    def done(rows: Sequence[int]) -> int:
        return begun(keep, f"{place[rows[0]]:06d}", len(rows), lambda n: of(rows[:n]))

    size = rows_fitting(models, prompts, max_new_tokens, batch_size)
    with tqdm(total=len(prompts), desc=bar, unit="prompt", disable=not bar, delay=1) as shown:
        for rows, made in in_shared_parts(bar or "lockstep", by_length, size, written, done):
            for row, own in zip(rows, made, strict=True):
                found[row] = _of_plain(prompts[row], own)
            shown.update(len(rows))
    return [found[row] for row in range(len(prompts))]


def _plain(written: Written) -> dict[str, Any]:
    """All but the prompt."""
    return {one.name: getattr(written, one.name) for one in fields(written) if one.name != "prompt"}


def _of_plain(prompt: Prompt, kept: dict[str, Any]) -> Written:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()
    }
    return Written(prompt.with_tokens(values["tokens"]), **values)


class Run:
    """One batch being written.

    Args:
        recipient: the model that writes.
        donor: the model that reads along; None where there is none.
        batch: padded on the left.
        intervention: what is done to the recipient.
        places: at which tokens; the intervention's own.
        chooser: chooses every next token.
        numbers: the batch's rows as the chooser knows them.
    """

    def __init__(
        self,
        recipient: HookedVLM,
        donor: HookedVLM | None,
        batch: PromptBatch,
        intervention: Intervention,
        places: Places,
        chooser: Chooser,
        numbers: Sequence[int],
    ) -> None:
        self._batch, self._chooser, self._numbers = batch, chooser, numbers
        self._ends = set(batch.prompts[0].builder.end_ids)
        self._places, self._intervention = places, intervention
        self._donor = None if donor is None else CachedModel(donor, batch)
        self._recipient = CachedModel(recipient, batch)
        self._rows = list(range(len(batch)))  # still in the batch
        self._done = [False] * len(batch)
        self._tokens: list[list[int]] = [[] for _ in batch.prompts]
        self._theirs: list[list[int]] = [[] for _ in batch.prompts]
        self._divergence: list[int | None] = [None] * len(batch)

    def write(self, steps: int) -> None:
        """Write until every row has ended."""
        with ExitStack() as stack:
            if self._donor is not None:
                stack.enter_context(self._donor.vlm.hooks(self._intervention.donor_hooks))
            stack.enter_context(self._recipient.vlm.hooks(self._intervention.recipient_hooks))
            tokens = None
            for step in range(steps):
                if tokens is not None:
                    self._places.advance(tokens.tolist(), [self._done[row] for row in self._rows])
                logits = self._next(tokens, step)
                tokens = self._chooser.choose(logits, [self._numbers[row] for row in self._rows], step)
                for row, token in zip(self._rows, tokens.tolist(), strict=True):
                    if not self._done[row]:
                        self._tokens[row].append(token)
                        self._done[row] = token in self._ends
                if all(self._done):
                    return
                tokens = self._without_finished(tokens)

    def result(self, row: int, steps: int) -> Written:
        """What came of a row."""
        prompt, ids = self._batch.prompts[row].with_tokens(self._tokens[row]), self._tokens[row]
        trace = prompt.trace
        cut_off = not self._done[row]
        why = f"cut off at {steps} tokens: {trace.why}".rstrip(": ") if cut_off else trace.why
        return Written(
            prompt,
            tuple(ids),
            prompt.builder.decode(ids),
            trace.answer,
            trace.ok,
            why,
            tuple(self._places.counts[:, row].tolist()),
            tuple(self._theirs[row]),
            self._divergence[row],
        )

    def _next(self, tokens: Int[Tensor, " row"] | None, step: int) -> Float[Tensor, "row vocab"]:
        """The logits that the next token of every row is chosen by."""
        if self._donor is None:
            with self._intervention.writing():
                return self._recipient.read(tokens)
        with self._intervention.reading():
            theirs = self._donor.read(tokens)
        with self._intervention.writing():
            ours = self._recipient.read(tokens)
        new = self._compared(theirs, self._intervention.logits(theirs, ours), step)
        if self._intervention.waits and any(new):
            self._places.diverge(new)
            with self._intervention.writing():
                ours = self._recipient.read_again()
        return self._intervention.logits(theirs, ours)

    def _compared(
        self, theirs: Float[Tensor, "row vocab"], ours: Float[Tensor, "row vocab"], step: int
    ) -> list[bool]:
        """Keep what the donor would write; which rows have just come to their divergence."""
        new = []
        choices = (self._chooser.arg_max(logits).tolist() for logits in (theirs, ours))
        for row, donor, recipient in zip(self._rows, *choices, strict=True):
            new.append(not self._done[row] and self._divergence[row] is None and donor != recipient)
            if not self._done[row]:
                self._theirs[row].append(donor)
            if new[-1]:
                self._divergence[row] = step
        return new

    def _without_finished(self, tokens: Int[Tensor, " row"]) -> Int[Tensor, " kept"]:
        """Let finished rows leave once they are many; the copy of the caches pays only then."""
        going = [i for i, row in enumerate(self._rows) if not self._done[row]]
        if len(going) > _CROWDED * len(self._rows):
            return tokens
        kept = torch.tensor(going)
        for model in (self._donor, self._recipient):
            if model is not None:
                model.keep(kept)
        self._places.keep(going)
        self._intervention.keep()
        self._rows = [self._rows[i] for i in going]
        return tokens[kept.to(tokens.device)]
