"""The cells of a component map on one batch: one component at one role, patched, by the sweep engine."""

from __future__ import annotations

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
from interp.metrics import Metric
from interp.prompts import PromptBatch
from interp.prompts.pairing import PatchBatch
from interp.sweep.activations import activation_of
from interp.sweep.batch import BatchSweep
from interp.sweep.edits import Edit, Span
from interp.sweep.places import of_vision


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
        """Runs the model once, and once more on `others`, the rows' partners (`interp.prompts.pairing.beside`)."""
        image = bool(batch.with_image.any())
        kept = [name for name in names if image or not of_vision(name)]
        self._others: Mapping[str, Tensor] = {}
        with torch.no_grad():
            output, self._cache = vlm.run_with_cache(batch.inputs, kept, use_cache=False)
            if others is not None:
                self._others = vlm.run_with_cache(others.to(vlm.device).inputs, kept, use_cache=False)[1]
        self.vlm = vlm
        self.metric = metric(output.logits, batch).double().cpu().numpy()

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


@dataclass(frozen=True)
class Cell:
    """One patch: a component at a role, from the donor, from the donor on another example, or from itself."""

    kind: str
    component: int
    role: int
    edits: tuple[Edit, ...]
    rows: Bool[Tensor, " batch"]


def cells_of(
    donor: Donor,
    own: Donor,
    ready: PatchBatch,
    wanted: Sequence[Component],
    roles: Sequence[str],
    kinds: Sequence[str] = ("donor", "other", "self"),
) -> list[Cell]:
    """Every component at every role that some row has (`self`: at all tokens), by kind of donor; see `Cell`."""
    cells = []
    whole = torch.ones_like(ready.partnered)
    # An image that no token stands for (it is attended to, or put before the text) is everybody's: role "all".
    of_image = "image" if bool(ready.where("image").any()) else "all"
    for kind in kinds:
        usable = ready.partnered if kind == "other" else whole
        for c, component in enumerate(wanted):
            early = component.point in BEFORE_THE_DECODER
            for r, role in enumerate(roles if kind != "self" else [None]):
                where = ready.where(role or "all")
                present = usable & (ready.batch.with_image if early else where.any(-1))
                if (early and role not in (of_image, None)) or not present.any():
                    continue
                source = own if kind == "self" else donor
                edits = edits_of(own, source, component, None if early else where, early, kind == "other")
                cells.append(Cell(kind, c, r, edits, present))
    return cells


def edits_of(
    own: Donor,
    source: Donor,
    component: Component,
    where: Bool[Tensor, "batch pos"] | None,
    early: bool,
    other: bool = False,
) -> tuple[Edit, ...]:
    """The edits that put a component's activation from one run into another.

    Args:
        own: the recipient.
        source: the donor.
        component: what is moved; edits of several hook points where it has several.
        where: tokens; None for the vision side.
        early: whether it lies before the decoder.
        other: take every row's activation from its partner instead.
    """

    points, head = own.vlm.hook_points, component.head
    return tuple(
        Edit(points[name], partial(_moved, source, name, head, early, other), where, head)
        for name in component.hooks
    )


def _moved(
    source: Donor,
    name: str,
    head: int | None,
    early: bool,
    other: bool,
    activation: Float[Tensor, "..."],
    span: Span,
) -> Float[Tensor, "..."]:
    """What takes an activation's place: see `interp.sweep.edits.New`."""
    return source.activation(name, head, None if early else span, other).to(activation)


def run_cells(
    vlm: HookedVLM, ready: PatchBatch, metric: Metric, cells: Sequence[Cell], bar: tqdm
) -> list[Float[np.ndarray, " batch"]]:
    """metric(patched) - metric(clean) of each cell, NaN for the examples that it does not touch."""

    def read(logits: Tensor, batch: PromptBatch) -> Tensor:
        return metric(logits, batch)[None]

    sweep = BatchSweep(vlm, ready.batch, ready.reads, read, [cell.edits for cell in cells])
    found = [np.full(len(ready.batch), np.nan) for _ in cells]
    for number, values in sweep.run(range(len(cells))):
        rows = cells[number].rows.cpu().numpy()
        found[number][rows] = (values - sweep.clean)[0].double().cpu().numpy()[rows]
        bar.update()
    return found
