"""At which tokens of the current forward pass something is done, as the roles of growing traces say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.prompts import PromptBatch
from interp.prompts.reading import TraceReader

_OF_TRACES = {"reasoning", "answer", "template"}


@runtime_checkable
class When(Protocol):
    """Anything that is done at some tokens only; `Moved` says what the fields mean."""

    @property
    def when(self) -> tuple[str, ...]: ...

    @property
    def from_divergence(self) -> bool: ...


class Places:
    """The tokens at which each spec acts, for the forward pass that is about to run.

    Attributes:
        masks: one per spec, [row column] of the forward pass.
        somewhere, everywhere: whether a spec's mask has any, or only, tokens at which it acts.
        counts: tokens at which each spec acted, [spec row of the whole batch].
    """

    def __init__(self, batch: PromptBatch, specs: Sequence[When]) -> None:
        self._batch, self._specs = batch, list(specs)
        self._rows = list(range(len(batch)))
        self._diverged = [False] * len(batch)
        self._ended = [False] * len(batch)
        by_role = any("generated" not in spec.when and _OF_TRACES.intersection(spec.when) for spec in specs)
        self._readers = [TraceReader(prompt) for prompt in batch.prompts] if by_role else None
        self._last = [prompt.roles[-1] for prompt in batch.prompts]
        self._in_prompt = True
        self.counts: Int[Tensor, "spec row"] = torch.zeros(len(self._specs), len(batch), dtype=torch.long)
        self._set([self._of_prompt(spec) for spec in specs])
        self._count()

    def advance(self, tokens: Sequence[int], ended: Sequence[bool]) -> None:
        """These tokens, one per row, are read next; nothing is done in rows that have ended."""
        self._in_prompt, self._ended = False, list(ended)
        if self._readers is None:
            self._last = [""] * len(tokens)
        else:
            pairs = zip(self._rows, tokens, strict=True)
            self._last = [self._readers[row].feed(token)[0] for row, token in pairs]
        self._set([self._of_last(spec) for spec in self._specs])
        self._count()

    def diverge(self, new: Sequence[bool]) -> None:
        """Some rows have come to their divergence; the masks are now those of the last token, to be read again."""
        before = [mask[:, -1:].clone() for mask in self.masks]
        for row, is_new in zip(self._rows, new, strict=True):
            self._diverged[row] |= is_new
        self._set([self._of_last(spec) for spec in self._specs])
        for spec, (mask, old) in enumerate(zip(self.masks, before, strict=True)):
            self.counts[spec, self._rows] += (mask & ~old)[:, 0].long()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the rows."""
        self._rows = [self._rows[row] for row in rows]
        self._last = [self._last[row] for row in rows]
        self._ended = [self._ended[row] for row in rows]

    def _of_prompt(self, spec: When) -> Bool[Tensor, "row column"]:
        mask = torch.zeros_like(self._batch.roles, dtype=torch.bool)
        if spec.from_divergence:
            return mask
        for name in spec.when:
            if name != "generated":
                mask |= self._batch.mask("all" if name == "prefill" else name)
        return mask

    def _of_last(self, spec: When) -> Bool[Tensor, "row 1"]:
        whole = ("prefill" if self._in_prompt else "generated") in spec.when
        here = [
            not ended and (whole or role in spec.when) and (not spec.from_divergence or self._diverged[row])
            for row, role, ended in zip(self._rows, self._last, self._ended, strict=True)
        ]
        return torch.tensor(here, dtype=torch.bool)[:, None]

    def _set(self, masks: list[Bool[Tensor, "row column"]]) -> None:
        self.masks = masks
        self.somewhere = [bool(mask.any()) for mask in masks]
        self.everywhere = [bool(mask.all()) for mask in masks]

    def _count(self) -> None:
        for spec, mask in enumerate(self.masks):
            self.counts[spec, self._rows] += mask.sum(-1).cpu()
