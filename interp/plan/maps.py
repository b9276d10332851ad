"""What a component map computes and holds: its own cells, on its own batches, counted and not run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hooks.memory import limit
from hooks.points import HookPoint
from interp.map.batch import rows_at_once
from interp.map.cells import Cell, Donor, cells_of
from interp.map.component_map import FURTHER, MAP_POINTS, RANDOM, batches_of, roles_of
from interp.map.components import BEFORE_THE_DECODER, Component, cached_names, components
from interp.plan.arithmetic import Arithmetic
from interp.plan.images import pictures_of
from interp.plan.memory import held_by_sweep
from interp.plan.runs import Reads, Runs
from interp.plan.structure import Weightless
from interp.plan.sweeps import SweepCost
from interp.plan.work import Work, together
from interp.prompts import Prompt, collate
from interp.prompts.pairing import PatchBatch, beside, partners
from interp.sweep.planned import PlannedSweep

ASKED = {"donor": 1, "self": 1, "random": 3, "other": 3}
"""Activations that are made for one cell of a kind: the donor's, or the recipient's and both sides of a difference."""


class Undone(Donor):
    """A donor that is not run: cells are asked of it, never activations."""

    def __init__(self, vlm: Weightless) -> None:
        self.vlm = vlm


class MapPlan:
    """A component map of a pair, batch by batch.

    Args:
        vlm: the structure that both models have.
        reads: what the metric reads.
        directions: how many.
        points, roles, batch_size, n_random, further: as in `interp.map.component_map.component_map`.
        at_tokens: whether the model can be taken up at a token.
        kinds: by default those that go with `further`.
        wanted: components other than those of the points.
    """

    def __init__(
        self,
        vlm: Weightless,
        reads: Reads,
        directions: int = 2,
        points: Sequence[str] = MAP_POINTS,
        roles: Sequence[str] | None = None,
        batch_size: int = 16,
        n_random: int = RANDOM,
        kinds: Sequence[str] = ("donor", "random", *FURTHER),
        at_tokens: bool = True,
        max_memory: int | None = None,
        wanted: Sequence[Component] | None = None,
    ) -> None:
        self._vlm, self._reads, self._directions = vlm, reads, directions
        self._points, self._roles, self._batch_size = points, roles, batch_size
        self._n_random, self._kinds = n_random, kinds
        self._at_tokens, self._max_memory = at_tokens, max_memory
        self._own, self._wanted = Runs(vlm, batch_size), wanted

    def work(self, prompts: Sequence[Prompt], what: str = "component map") -> Work:
        """Of all prompts."""
        images = any(prompt.has_image for prompt in prompts)
        offered = components(self._vlm, self._points) if self._wanted is None else self._wanted
        wanted = [one for one in offered if images or one.point not in BEFORE_THE_DECODER]
        roles = roles_of(prompts, self._roles)
        partner = partners(prompts)
        if "other" not in self._kinds:
            partner = partner.fill_(-1)
        batches, size = [], self._batch_size
        if limit() is not None:
            models = {"recipient": self._vlm, "donor": self._vlm}
            size = rows_at_once(models, wanted, max(map(len, prompts)), self._kinds, size)
        for rows in batches_of(prompts, size):
            some = [prompts[row] for row in rows]
            others = beside(prompts, rows, partner)
            batches.append(self._batch(some, others, partner[rows], wanted, roles))
        return together(what, batches)

    def _batch(
        self,
        some: Sequence[Prompt],
        others: Sequence[Prompt],
        partner: Tensor,
        wanted: Sequence[Component],
        roles: Sequence[str],
    ) -> Work:
        vlm, batch = self._vlm, collate(some)
        ready = PatchBatch(batch, self._reads(batch), partner)
        undone = Undone(vlm)
        cells = cells_of(undone, undone, ready, wanted, roles, self._kinds, range(self._n_random))
        sweep = swept(self._own, ready, cells, self._at_tokens, self._max_memory)
        (rows, width), pictures, arithmetic = batch.roles.shape, pictures_of(vlm, some), self._own.arithmetic
        clean = arithmetic.forward(rows, width, pictures, rows + int(ready.reads.sum()))
        beside_it = 0
        if others:
            own = pictures_of(vlm, others)
            beside_it = arithmetic.forward(rows, max(map(len, others)), own, rows)
        flops = 2 * (clean + beside_it) + self._directions * sweep.flops
        donors = self._own.footprint.kept(cached_names(vlm, wanted), rows, width, pictures)
        held = {"activations of both models": 2 * donors * (1 + bool(others)), **sweep.held}
        runs = self._directions * (len(cells) + 1) + 2 + 2 * bool(others)
        disk = 2 * 8 * rows * self._directions * len(wanted) * len(roles) * (3 + self._n_random)
        # each model's clean runs are one use, and so are the cells of each direction
        return Work("batch", runs, flops, held, disk, uses=2 + self._directions)


def swept(
    runs: Runs, ready: PatchBatch, cells: Sequence[Cell], at_tokens: bool, max_memory: int | None = None
) -> Work:
    """`interp.map.cells.run_cells`: the sweep, and what takes each activation's place."""
    vlm, batch, edits = runs.vlm, ready.batch, [cell.edits for cell in cells]
    planned = PlannedSweep(vlm, batch, ready.reads, edits, (), max_memory, at_tokens)
    pictures = pictures_of(vlm, batch.prompts)
    still = {number for number, cell in enumerate(cells) if cell.kind == "self"}
    flops = SweepCost(runs.arithmetic, planned, pictures).all(still)
    flops += sum(_made(runs.arithmetic, cell, planned) for cell in cells)
    held = held_by_sweep(runs.footprint, planned, pictures, still)
    return Work("cells", len(cells) + 1, flops, held)


def _made(arithmetic: Arithmetic, cell: Cell, planned: PlannedSweep) -> int:
    """What takes an activation's place, and what the writer then adds."""
    total = 0
    for edit in cell.edits:
        first = edit.first_column()
        if edit.where is None or first is None or edit.point.layer is None or first >= planned.end:
            continue
        tokens = len(planned.batch) * (planned.end - first)
        total += tokens * _of_one(arithmetic, edit.point, cell.kind)
    return total


def _of_one(arithmetic: Arithmetic, point: HookPoint, kind: str) -> int:
    """One token: a head through W_O, once as it is and once for each activation that is asked for."""
    block = arithmetic.blocks[point.layer or 0]
    if point.leaf == "hook_result":
        heads = (1 + ASKED[kind]) * arithmetic.row(block.out) // block.n_heads
        writer = block.writer("attn")
        behind_a_norm = writer is not None and writer.module != writer.body and kind != "self"
        return heads + behind_a_norm * arithmetic.row(block.out)
    if point.leaf == "hook_z":
        return arithmetic.row(block.out) * (kind != "self")
    if point.leaf == "hook_post" and block.mlp_out:
        return arithmetic.row(block.mlp_out) * (kind != "self")
    if point.leaf == "hook_expert_out" and point.experts is not None:
        return (1 + ASKED[kind]) * arithmetic.row(point.experts.module)
    return 0
