"""A sweep of one batch that is planned and never run: the same reach, the same lanes, the same storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from hooks import HookedVLM
from interp.prompts import PromptBatch
from interp.sweep.batch import BatchSweep
from interp.sweep.edits import Edit, Span


@dataclass(frozen=True, eq=False)
class _Unrun:
    """What planning asks of a stored run.

    Attributes:
        end: one past the last column that is read.
        image_mask: tokens that stand for images.
        image_rows: whether the projector's rows are the stream's at those tokens.
    """

    end: int
    image_mask: Bool[Tensor, "batch pos"]
    image_rows: bool


@dataclass(frozen=True, eq=False)
class _Unread:
    """What planning asks of a reading: where it reads."""

    reads: Bool[Tensor, "batch pos"]


class PlannedSweep(BatchSweep):
    """`BatchSweep` of a model that is not run; its weights may be on the meta device.

    Attributes:
        tried: whether taking the model up at a token is tried, even if it turns out that it cannot be.
    """

    def __init__(
        self,
        vlm: HookedVLM,
        batch: PromptBatch,
        reads: Bool[Tensor, "batch pos"],
        interventions: Sequence[Sequence[Edit]],
        names: Sequence[str] = (),
        max_memory: int | None = None,
        at_tokens: bool = True,
    ) -> None:
        """Plans as `BatchSweep` does.

        Args:
            vlm, batch, interventions, names, max_memory: as in `BatchSweep`; the batch on any device.
            reads: the tokens whose logits are read.
            at_tokens: whether the model can be taken up at a token (`shortcuts` of a sweep that was run).
        """
        self.vlm, self.batch, self.interventions = vlm, batch, interventions
        self._reading: Any = _Unread(reads)
        self._max_memory, self._names = max_memory, names
        self._halves = {}
        columns = reads.any(0).nonzero()[:, 0]
        newlines = any(name.endswith("image_newline") for name, _ in vlm.model.named_parameters())
        stored: Any = _Unrun(int(columns[-1]) + 1, batch.mask("image"), not newlines)
        self.tried = any(self._is_fast(edits) for edits in interventions)
        self._run = stored if at_tokens and self.tried else None
        self.shortcuts = "tokens and layers" if self._run is not None else "layers"

    @property
    def reads(self) -> Bool[Tensor, "batch pos"]:
        """The tokens whose logits are read."""
        return self._reading.reads

    @property
    def end(self) -> int:
        """One past the last column that is read."""
        return int(self.reads.any(0).nonzero()[-1]) + 1

    @property
    def n_read(self) -> int:
        """Places whose logits are read."""
        return int(self.reads.sum())

    def lanes_of(self, span: Span) -> int:
        """How many run at once."""
        return self._lanes_at_once(span)
