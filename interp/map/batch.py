"""The prompts of a component map that run together: every cell of every direction, patched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import HookedVLM
from hooks.batches import fitting, forward_bytes, logits_bytes
from hooks.memory import point_bytes
from interp.map.cells import KINDS, Donor, cells_of, run_cells
from interp.map.clean import CleanBatch, CleanRuns
from interp.map.components import Component, cached_names
from interp.metrics import Metric
from interp.prompts import Prompt, collate
from interp.prompts.pairing import PatchBatch
from interp.sweep.batch import stored_bytes


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, in every direction.

    Attributes:
        others: by model, the rows' partners (`interp.prompts.pairing.beside`); none where nothing is borrowed.
        partner: of each row, which of all prompts its partner is.
        seeds: of the random directions.
        clean: clean runs of one of the models that other maps start from, too.
    """

    models: Mapping[str, HookedVLM]
    prompts: Mapping[str, Sequence[Prompt]]
    others: Mapping[str, Sequence[Prompt]]
    partner: Int[Tensor, " row"]
    metric: Metric
    directions: Mapping[str, tuple[str, str]]
    wanted: Sequence[Component]
    roles: Sequence[str]
    kinds: Sequence[str]
    seeds: Sequence[int]
    bar: tqdm
    clean: CleanRuns | None = None

    @property
    def about(self) -> list[list[list[int]]]:
        """The tokens of all prompts, and of their partners."""
        beside = [some for some in self.others.values() if some]
        return [[list(prompt.ids) for prompt in some] for some in [*self.prompts.values(), *beside]]

    def run(self) -> dict[str, np.ndarray]:
        """By kind [direction component role row], the random ones [direction draw component role row]; and the ends
        [2 direction row], recipient and donor as they are.
        """
        n = len(next(iter(self.prompts.values())))
        shape = (len(self.directions), len(self.wanted), len(self.roles), n)
        found = {
            kind: np.full((shape[0], len(self.seeds), *shape[1:]) if kind == "random" else shape, np.nan)
            for kind in KINDS
        }
        ends = np.full((2, shape[0], n), np.nan)
        runs = {name: self._clean_runs(name) for name in self.models}
        for d, (donor, recipient) in enumerate(self.directions.values()):
            own = runs[recipient]
            ways = (runs[donor].donor, own.donor, own.ready)
            cells = cells_of(*ways, self.wanted, self.roles, self.kinds, self.seeds)
            changes = run_cells(self.models[recipient], own.ready, self.metric, cells, self.bar, own.stored)
            for cell, values in zip(cells, changes, strict=True):
                draw = (cell.draw,) if cell.kind == "random" else ()
                found[cell.kind][(d, *draw, cell.component, cell.role)] = values
            ends[0, d], ends[1, d] = own.donor.metric, runs[donor].donor.metric
        return {**found, "ends": ends}

    def _clean_runs(self, name: str) -> CleanBatch:
        vlm = self.models[name]
        if self.clean is None or self.clean.vlm is not vlm:
            return self._run_clean(name)
        names = cached_names(vlm, self.wanted)
        make = partial(self._run_clean, name)
        return self.clean.of(self.prompts[name], self.others[name], names, self.metric, make)

    def _run_clean(self, name: str) -> CleanBatch:
        vlm = self.models[name]
        batch = collate(self.prompts[name]).to(vlm.device)
        ready = PatchBatch(batch, self.metric.reads(batch), self.partner.to(vlm.device))
        others = collate(self.others[name]) if self.others[name] else None
        with vlm.exclusive("clean runs"):
            return CleanBatch(ready, Donor(vlm, batch, cached_names(vlm, self.wanted), self.metric, others))


def rows_at_once(
    models: Mapping[str, HookedVLM],
    wanted: Sequence[Component],
    width: int,
    kinds: Sequence[str],
    batch_size: int,
) -> int:
    """Prompts that run together: `batch_size`, or as many as there is memory for.

    Of each the activations of both models are kept (those on its partner too, where that is a control), and the
    streams, keys and values that the recipient is taken up at.

    Args:
        models: of the pair.
        wanted: what is patched.
        width: tokens of the longest prompt.
        kinds: what takes an activation's place.
        batch_size: at most.

    Raises:
        FrankenlensError: there is no memory for one prompt.
    """
    tokens = {"input_ids": torch.empty(1, width, device="meta")}
    sizes = []
    for vlm in models.values():
        points = map(vlm.point, cached_names(vlm, wanted))
        cached = sum(point_bytes(vlm, point, tokens) for point in points)
        cached *= len(models) * (2 if "other" in kinds else 1)
        of_row = cached + stored_bytes(vlm, width) + 2 * forward_bytes(vlm, width)
        sizes.append(fitting(vlm, batch_size, of_row, "a map", logits_bytes(vlm, width)))
    return min(sizes)
