"""The cells of a component map on one batch: one component at one role, patched, by the sweep engine.

Four things take an activation's place, each a lane of the same sweep:

    donor    the donor's activation
    random   the recipient's plus a random direction of the norm that the donor's difference has, token by token
    other    the recipient's plus the difference between donor and recipient on another example with the same roles
    self     the recipient's own, at all tokens

`random` is as large as the donor's and means nothing; `other` is what the change of weights does to this component in
general, without what it does to this example.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooks import HookedVLM
from interp.map.components import BEFORE_THE_DECODER, Component
from interp.metrics.logits import run_with_cache_for_logits
from interp.metrics.reading import Metric, Reading
from interp.prompts import PromptBatch
from interp.prompts.pairing import PatchBatch, of_rows
from interp.sweep.activations import activation_of
from interp.sweep.batch import BatchSweep
from interp.sweep.edits import Edit, Span
from interp.sweep.places import of_vision
from interp.sweep.stored import StoredRun


class Donor:
    """A model's clean activations and metric on a batch, and its activations on every row's partner."""

    def __init__(
        self,
        vlm: HookedVLM,
        batch: PromptBatch,
        names: Sequence[str],
        metric: Metric,
        others: PromptBatch | None = None,
    ) -> None:
        """Runs the model once, and once more on the rows' partners (`interp.prompts.pairing.beside`)."""
        image = bool(batch.with_image.any())
        kept = [name for name in names if image or not of_vision(name)]
        self._others: Mapping[str, Tensor] = {}
        reading = Reading([metric], batch)
        with torch.no_grad():
            logits, self._cache = run_with_cache_for_logits(vlm, batch.inputs, kept, reading.columns)
            if others is not None:
                inputs = others.to(vlm.device).inputs
                self._others = run_with_cache_for_logits(vlm, inputs, kept, reading.columns[-1:])[1]
            self.metric = reading(logits)[0].double().cpu().numpy()
        self.vlm = vlm

    @property
    def n_bytes(self) -> int:
        """Of the activations that it keeps."""
        return sum(kept.nbytes for cache in (self._cache, self._others) for kept in cache.values())

    def activation(
        self, hook: str, head: int | None, span: Span | None = None, other: bool = False
    ) -> Float[Tensor, "..."]:
        """An activation, of some columns only if a span is given; a head's result goes through this model's own W_O.

        A product of a segment rounds as the recipient's own of that segment does, which one of all columns need not.
        With `other`, each row's is that on its partner.
        """
        return activation_of(self.vlm, partial(self._read, span, other), hook, head)

    def _read(self, span: Span | None, other: bool, name: str) -> Float[Tensor, "..."]:
        kept = (self._others if other else self._cache)[name]
        return kept if span is None else kept[:, span.columns]


KINDS = ("donor", "random", "other", "self")
"""What takes an activation's place; see the top of this module."""


@dataclass(frozen=True)
class Cell:
    """One patch: a component at a role, replaced by one of `KINDS`; `draw` counts the random directions."""

    kind: str
    component: int
    role: int
    edits: tuple[Edit, ...]
    rows: Bool[Tensor, " batch"]
    draw: int = 0


def cells_of(
    donor: Donor,
    own: Donor,
    ready: PatchBatch,
    wanted: Sequence[Component],
    roles: Sequence[str],
    kinds: Sequence[str] = KINDS,
    seeds: Sequence[int] = (0,),
) -> list[Cell]:
    """Every component at every role that some row has (`self`: at all tokens), by kind and, of `random`, by seed."""
    cells = []
    whole = torch.ones_like(ready.partnered)
    # An image that no token stands for (it is attended to, or put before the text) is everybody's: role "all".
    of_image = "image" if bool(ready.where("image").any()) else "all"
    for kind, draw in [(one, n) for one in kinds for n in range(len(seeds) if one == "random" else 1)]:
        usable = ready.partnered if kind == "other" else whole
        for c, component in enumerate(wanted):
            early = component.point in BEFORE_THE_DECODER
            for r, role in enumerate(roles if kind != "self" else [None]):
                where = ready.where(role or "all")
                present = usable & (ready.batch.with_image if early else where.any(-1))
                if (early and role not in (of_image, None)) or not present.any():
                    continue
                place = None if early else where
                edits = edits_of(own, donor, component, place, ready, kind, seeds[draw])
                cells.append(Cell(kind, c, r, edits, present, draw))
    return cells


def edits_of(
    own: Donor,
    donor: Donor,
    component: Component,
    where: Bool[Tensor, "batch pos"] | None,
    ready: PatchBatch,
    kind: str = "donor",
    seed: int = 0,
) -> tuple[Edit, ...]:
    """The edits that put something in a component's place.

    Args:
        own: the recipient, clean.
        donor: the donor, clean.
        component: what is moved; edits of several hook points where it has several.
        where: tokens; None for the vision side.
        ready: the batch.
        kind: of `KINDS`.
        seed: of random directions, which depend on it, on the example and on the hook point, and on nothing else.
    """

    points, head = own.vlm.hook_points, component.head
    return tuple(
        Edit(points[name], _New(own, donor, name, head, where is None, ready, kind, seed), where, head)
        for name in component.hooks
    )


@dataclass(frozen=True, eq=False)
class _New:
    """What takes an activation's place: see `interp.sweep.edits.New`."""

    own: Donor
    donor: Donor
    name: str
    head: int | None
    early: bool
    ready: PatchBatch
    kind: str
    seed: int

    def __call__(self, activation: Float[Tensor, "..."], span: Span) -> Float[Tensor, "..."]:
        here = None if self.early else span  # an image's tokens are taken whole
        if self.kind in ("donor", "self"):
            source = self.own if self.kind == "self" else self.donor
            return source.activation(self.name, self.head, here).to(activation)
        own = self.own.activation(self.name, self.head, here)
        wide = torch.promote_types(own.dtype, torch.float32)
        change = self._change(own.device, wide, here, other=self.kind == "other")
        if self.kind == "random":
            change = self._direction(change, span) * change.norm(dim=-1, keepdim=True)
        return (own.to(wide) + change).to(activation)

    def _change(
        self, device: torch.device, wide: torch.dtype, here: Span | None, other: bool
    ) -> Float[Tensor, "..."]:
        """Donor - recipient, on every row's partner with `other`."""
        theirs, own = (
            one.activation(self.name, self.head, here, other).to(device, wide)
            for one in (self.donor, self.own)
        )
        return theirs - own

    def _direction(self, like: Float[Tensor, "..."], span: Span) -> Float[Tensor, "..."]:
        """Random, of norm 1, drawn token by token; an example's draws are its own, whatever stands in its batch."""
        if self.early:
            parts, axis = of_rows(like, self.ready.batch)
            drawn = torch.cat([self._draw(row, part) for row, part in enumerate(parts)], dim=axis)
        else:
            drawn = torch.zeros_like(like)
            for row, real in enumerate(self.ready.batch.mask("all").tolist()):
                first, last = real.index(True), len(real) - real[::-1].index(True)
                start, stop = max(first, span.start), min(last, span.stop)
                if start < stop:
                    one = self._draw(row, like.new_empty(last - first, *like.shape[2:]))
                    drawn[row, start - span.start : stop - span.start] = one[start - first : stop - first]
        return drawn / drawn.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(drawn.dtype).tiny)

    def _draw(self, row: int, like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        text = f"{self.seed} {self.name} {self.head} {self.ready.batch.prompts[row].example.id}"
        generator = torch.Generator(like.device).manual_seed(zlib.crc32(text.encode()))
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def run_cells(
    vlm: HookedVLM,
    ready: PatchBatch,
    metric: Metric,
    cells: Sequence[Cell],
    bar: tqdm,
    stored: dict[tuple[str, ...], StoredRun] | None = None,
) -> list[Float[np.ndarray, " batch"]]:
    """metric(patched) - metric(clean) of each cell, NaN for the examples that it does not touch.

    `stored`: see `interp.sweep.batch.BatchSweep`.
    """
    reading, edits = Reading([metric], ready.batch), [cell.edits for cell in cells]
    found = [np.full(len(ready.batch), np.nan) for _ in cells]
    with vlm.exclusive("a map's cells"):  # one use, however many runs
        sweep = BatchSweep(vlm, ready.batch, reading, edits, stored=stored)
        for number, values in sweep.run(range(len(cells))):
            rows = cells[number].rows.cpu().numpy()
            found[number][rows] = (values - sweep.clean)[0].double().cpu().numpy()[rows]
            bar.update()
    return found
