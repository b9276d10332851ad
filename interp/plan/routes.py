"""What attention knockout computes and holds: its own cuts and controls, on its own batches, counted and not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from interp.knockout.cut import Knockout
from interp.knockout.effects import grouped
from interp.knockout.lanes import Lane
from interp.knockout.random_edges import control_kinds
from interp.knockout.routes import lanes_of, steps_of
from interp.plan.arithmetic import Arithmetic
from interp.plan.images import Pictures, pictures_of
from interp.plan.memory import Footprint, held_by_sweep
from interp.plan.runs import Reads
from interp.plan.structure import Weightless
from interp.plan.sweeps import SweepCost
from interp.plan.work import Work, together
from interp.prompts import Prompt, PromptBatch, collate
from interp.sweep.edits import Edit, Span
from interp.sweep.planned import PlannedSweep


class RoutesPlan:
    """`interp.knockout.routes.routes` of one model.

    Args:
        vlm: its structure.
        reads: what the metric reads.
        cuts, batch_size: as there.
        at_tokens: whether the model can be taken up at a token.
    """

    def __init__(
        self,
        vlm: Weightless,
        reads: Reads,
        cuts: Mapping[str, Sequence[Knockout]],
        batch_size: int,
        at_tokens: bool = True,
    ) -> None:
        self._vlm, self._reads, self._batch_size, self._at_tokens = vlm, reads, batch_size, at_tokens
        self._routes = [group[0] for group in cuts.values()]
        self._flat = [cut for group in cuts.values() for cut in group]
        self._arithmetic, self._footprint = Arithmetic(vlm), Footprint(vlm)

    def work(self, prompts: Sequence[Prompt], what: str = "routes") -> Work:
        """Of all prompts."""
        kinds = control_kinds(prompts, self._routes)
        steps = steps_of(range(len(prompts)), prompts, self._batch_size)
        return together(what, [self._batch([prompts[row] for row in rows], kinds) for rows in steps])

    def _batch(self, some: Sequence[Prompt], kinds: Sequence[str]) -> Work:
        vlm, batch = self._vlm, collate(some)
        seeds = [(0, row) for row in range(len(some))]
        lanes, beside = lanes_of(vlm, batch, self._flat, len(self._flat) // len(self._routes), kinds, seeds)
        every, pictures = [*lanes, *beside], pictures_of(vlm, some)
        planned = self._planned(batch)
        cost, reads = SweepCost(self._arithmetic, planned, pictures), planned.n_read
        if planned.shortcuts == "layers":
            (rows, width), longer = batch.roles.shape, sum(cost.longer(lane.start) for lane in every)
            again = self._arithmetic.forward(rows, width, pictures, rows + reads)
            return Work(
                "batch",
                len(every) + 3,
                cost.clean(True, True) + again + longer,
                self._held(planned, pictures),
            )
        unreached, groups = grouped(every, planned.end, len(some), vlm.device.type)
        flops = cost.clean(False, False)
        for span, riding in groups:
            flops += sum(cost.lane(lane.start, span.start, self._dense_at_the_end(lane)) for lane in riding)
        held = self._held(planned, pictures, groups) | {"edges that are cut": _edges(every)}
        return Work("batch", len(every) - len(unreached) + 1, flops, held)

    def _planned(self, batch: PromptBatch) -> PlannedSweep:
        """The clean run and its check, as those of a sweep whose edits start from the stream alone."""
        point = self._vlm.hook_points["blocks.0.hook_resid_pre"]
        edit = Edit(point, lambda activation, span: activation, batch.mask("decision"))
        return PlannedSweep(self._vlm, batch, self._reads(batch), [[edit]], at_tokens=self._at_tokens)

    def _dense_at_the_end(self, lane: Lane) -> bool:
        return any(not part.is_mask for part in lane.here(self._vlm.n_layers - 1))

    def _held(
        self,
        planned: PlannedSweep,
        pictures: Pictures,
        groups: Sequence[tuple[Span, Sequence[Lane]]] = (),
    ) -> dict[str, int]:
        """As a sweep's; in their widest block the lanes that ride are held as they came, as they are and as they go."""
        held, rows = held_by_sweep(self._footprint, planned, pictures, still=(0,)), len(planned.batch)
        most = 0
        for span, riding in groups:
            copies, queries = rows * len(riding), len(span)
            dense = any(not part.is_mask for lane in riding for part in lane.parts)
            hidden = 2 * copies * queries * span.stop
            own = self._footprint.lanes(copies, queries, span.stop, dense) + hidden
            most = max(most, own + 2 * self._footprint.stream(copies, queries))
        passing = max(held, key=lambda name: held[name] * (name in _PASSING))
        if most > held[passing]:
            held.pop(passing)
            held["cuts that run at once"] = most
        return held


_PASSING = ("a forward pass", "the check of the shortcuts", "lanes that run at once")


def _edges(lanes: Sequence[Lane]) -> int:
    """Lanes of one route share them."""
    edges = {id(part.edges): part.edges for lane in lanes for part in lane.parts}
    return sum(one.numel() for one in edges.values())
