"""IN under an adapter, read as a checkpoint: W + s B A, part by part, in float32 and never rounded to IN's type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from hooks.anatomy import Anatomy
from hooks.errors import FrankenlensError
from hooks.stored.checkpoint import PART, Checkpoint
from interp.comparison.adapter import Adapter
from interp.pair.adapter import is_adapter

Source = Checkpoint | Path | str


class Adapted(Checkpoint):
    """The checkpoint that IN is with an adapter; nothing is written, and one part is formed at a time.

    Tensors that the adapter changes are float32 (wider where IN is), so that no part of its update is lost where it is
    compared; all others are IN's own.

    Attributes:
        in_: IN.
        adapter: what changes it.

    Args:
        in_: IN's checkpoint.
        adapter: the folder of a PEFT adapter, or one that was read.

    Raises:
        FrankenlensError: as `Adapter`.
    """

    def __init__(self, in_: Checkpoint, adapter: Adapter | Path | str) -> None:
        self.in_ = in_
        self.adapter = adapter if isinstance(adapter, Adapter) else Adapter(adapter, in_)
        self.folder, self.ties, self.counters, self.ignored = self.adapter.folder, in_.ties, in_.counters, []
        self.layout, self.keys = in_.layout, in_.keys
        self._factors: dict[str, Float[Tensor, " row"]] = {}
        self.tensors = {
            name: replace(stored, dtype=torch.promote_types(torch.float32, stored.dtype))
            if name in self.adapter.changed
            else stored
            for name, stored in in_.tensors.items()
        }

    @cached_property
    def model(self) -> PreTrainedModel:
        """IN's, without weights."""
        return self.in_.model

    @cached_property
    def anatomy(self) -> Anatomy:
        """IN's."""
        return self.in_.anatomy

    def is_product(self, name: str) -> bool:
        """Whether a matrix changes by a product of two thin ones, so that these say all of its update."""
        return name in self.adapter.updates and name not in self.adapter.magnitudes

    def parts(self, name: str, entries: int = PART) -> Iterator[Shaped[Tensor, " entry"]]:
        """As `Checkpoint.parts`."""
        if name not in self.adapter.changed:
            yield from self.in_.parts(name, entries)
            return
        first = 0
        for part in self.in_.parts(name, entries):
            yield self._applied(name, part.to(self.tensors[name].dtype), first)
            first += len(part)

    def blocks(self, name: str, entries: int = PART) -> Iterator[Shaped[Tensor, "long short"]]:
        """As `Checkpoint.blocks`."""
        rows, columns = self.tensors[name].matrix or (self.tensors[name].entries, 1)
        if name not in self.adapter.changed or rows >= columns:
            yield from super().blocks(name, entries)
            return
        first = 0
        for block in self.in_.blocks(name, entries):
            own = block.to(self.tensors[name].dtype)
            here = slice(first, first + len(block))
            if name in self.adapter.replaced:
                own = self.adapter.replaced[name].reshape(rows, columns).T[here].to(own)
            else:
                own = own + self.adapter.updates[name].columns(here.start, here.stop, own.dtype)
                own = own * self._factor(name) if name in self.adapter.magnitudes else own
            yield own
            first += len(block)

    def sample(self, name: str, runs: int, length: int) -> Shaped[Tensor, " entry"]:
        """As `Checkpoint.sample`; a tensor that is changed is formed whole for it."""
        stored = self.tensors.get(name)
        if name not in self.adapter.changed or stored is None:
            return self.in_.sample(name, runs, length)
        whole = self.read(name).flatten()
        if stored.entries <= runs * length:
            return whole
        firsts = np.linspace(0, stored.entries - length, runs).astype(int)
        return torch.cat([whole[first : first + length] for first in firsts])

    def _applied(self, name: str, own: Float[Tensor, " entry"], first: int) -> Float[Tensor, " entry"]:
        """IN's entries from a place on, changed."""
        last, adapter = first + len(own), self.adapter
        if name in adapter.replaced:
            return adapter.replaced[name].flatten()[first:last].to(own)
        if name in adapter.offsets:
            return own + adapter.offsets[name][first:last].to(own)
        columns = adapter.updates[name].shape[1]
        top, bottom = first // columns, -(-last // columns)
        whole = adapter.updates[name].rows(top, bottom, own.dtype)
        here = slice(first - top * columns, last - top * columns)
        whole.view(-1)[here] += own
        if name in adapter.magnitudes:
            whole *= self._factor(name)[top:bottom, None]
        return whole.view(-1)[here]

    def _factor(self, name: str) -> Float[Tensor, " row"]:
        """DoRA: magnitude of each row / norm of the row of W + s B A (2402.09353, eq. 5)."""
        if name not in self._factors:
            update, stored = self.adapter.updates[name], self.tensors[name]
            rows, columns = update.shape
            norms, top = torch.empty(rows, dtype=stored.dtype), 0
            for part in self.in_.parts(name, columns * max(1, PART // columns)):
                own = part.to(stored.dtype).view(-1, columns)
                bottom = top + len(own)
                norms[top:bottom] = (own + update.rows(top, bottom, stored.dtype)).norm(dim=1)
                top = bottom
            self._factors[name] = self.adapter.magnitudes[name].to(stored.dtype) / norms
        return self._factors[name]


def checkpoint_of(
    source: Source, in_: Checkpoint | None = None, settings: Path | str | None = None
) -> Checkpoint:
    """A checkpoint, or IN under an adapter where the source is the folder of one.

    Args:
        source: a folder, or what was opened.
        in_: IN, for an adapter; a trainer's checkpoint without settings takes those of IN.
        settings: whose are taken, if not IN's.

    Raises:
        FrankenlensError: it cannot be read, or is an adapter and there is no IN for it.
    """
    if isinstance(source, Checkpoint):
        return source
    if in_ is None or not is_adapter(source):
        return Checkpoint(source, in_.folder if settings is None and in_ is not None else settings)
    if isinstance(in_, Adapted):
        raise FrankenlensError(f"{source} is an adapter, and so is its IN ({in_.folder}); merge that first.")
    return Adapted(in_, source)
