"""What planted pairs compute: every method of localizing on each, and how far plants alone move IN's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from interp.map.component_map import batches_of
from interp.map.components import BEFORE_THE_DECODER, Component
from interp.plan import decisions as plans
from interp.plan.attribution import attributed, integrated
from interp.plan.images import pictures_of
from interp.plan.maps import MapPlan
from interp.plan.memory import held_by_sweep
from interp.plan.prompts import Workload
from interp.plan.runs import Reads, Runs, of_trace
from interp.plan.sweeps import SweepCost
from interp.plan.work import Work, together
from interp.planting.methods import INTEGRATED_STEPS, cut_off, inner_of, left_out
from interp.prompts import collate
from interp.sweep import Intervention
from interp.sweep.intervention import bind
from interp.sweep.planned import PlannedSweep


def effect(runs: Runs, asked: Workload) -> Work:
    """`interp.planting.effect_of_plant`: IN's text, read by it and by the planted copy."""
    texts = runs.written("texts", asked.prompts, [asked.trace_tokens] * len(asked.prompts))
    return _copied(together("texts", [texts, runs.read("both models", asked.traces, of_trace, 2)]), runs)


@dataclass(frozen=True)
class TrialPlan:
    """`interp.planting.trial` of one pair.

    Attributes:
        runs: of both models.
        asked: the prompts of a pair.
        wanted: the components that methods choose among.
        at_tokens: whether the model can be taken up at a token.
    """

    runs: Runs
    asked: Workload
    wanted: Sequence[Component]
    at_tokens: bool

    def work(self, methods: Sequence[str]) -> Work:
        """Soft decisions, pairs that learnt nothing, and the methods."""
        parts = [*plans.found_decisions(self.runs, self.asked, "soft")]
        parts.append(plans.null_pairs(self.runs, self.asked, "soft"))
        patched = "patch, both ways" in methods
        for name in methods:
            if patched and name in ("patch RL → IN", "patch IN → RL"):
                continue  # found already
            parts += self._ways()[name]()
        return _copied(together("every method", parts), self.runs)

    def marks(self) -> Work:
        """`interp.planting.marks`: decisions, a map in both directions, and that of pairs that learnt nothing."""
        settings: dict[str, Any] = {"roles": self._roles, "wanted": self.wanted, "at_tokens": self.at_tokens}
        settings |= {"batch_size": self.runs.batch_size}
        whole = MapPlan(self.runs.vlm, of_trace, 2, kinds=("donor", "random"), **settings)
        one = MapPlan(self.runs.vlm, of_trace, 1, kinds=("donor",), **settings)
        parts = [*plans.found_decisions(self.runs, self.asked, "soft"), whole.work(self.asked.traces)]
        parts.append(plans.null_pairs(self.runs, self.asked, "soft"))
        parts.append(plans.noise_maps(self.runs, one, self.asked, "soft"))
        return _copied(together("marks", parts), self.runs)

    @property
    def _roles(self) -> list[str]:
        early = any(one.point in BEFORE_THE_DECODER for one in self.wanted)
        return ["all", "image"] if early else ["all"]

    def _ways(self) -> Mapping[str, Callable[[], Iterator[Work]]]:
        """What each method computes."""
        found: dict[str, Callable[[], Iterator[Work]]] = {
            "patch, both ways": lambda: self._patched(2, self.wanted),
            "skip": lambda: self._apart([left_out(one) for one in self.wanted]),
            "knockout": lambda: self._apart([cut_off(one) for one in self.wanted]),
            "compare": lambda: iter(()),
        }
        for way in ("RL → IN", "IN → RL"):
            found[f"patch {way}"] = lambda: self._patched(1, self.wanted)
            found[f"patch z {way}"] = lambda: self._patched(1, list(filter(None, map(inner_of, self.wanted))))
            found[f"attribution {way}"] = self._attributed
            found[f"integrated gradients {way}"] = self._integrated
            found[f"graft {way}"] = self._grafted
        return found

    def _patched(self, directions: int, wanted: Sequence[Component]) -> Iterator[Work]:
        settings: dict[str, Any] = {"roles": self._roles, "wanted": wanted, "at_tokens": self.at_tokens}
        one = MapPlan(
            self.runs.vlm, of_trace, 1, batch_size=self.runs.batch_size, kinds=("donor",), **settings
        )
        yield one.work(self.asked.traces, "patches").times(directions)

    def _attributed(self) -> Iterator[Work]:
        points = [one.point for one in self.wanted]
        yield attributed(self.runs, self.asked.traces, of_trace, points, 1)

    def _integrated(self) -> Iterator[Work]:
        points = [one.point for one in self.wanted]
        yield integrated(self.runs, self.asked.traces, of_trace, points, INTEGRATED_STEPS)

    def _grafted(self) -> Iterator[Work]:
        yield self.runs.read("grafts", self.asked.traces, of_trace, len(self.wanted))

    def _apart(self, interventions: Sequence[Intervention | None]) -> Iterator[Work]:
        """The same sweep in both models."""
        known = [one for one in interventions if one is not None]
        if known:
            yield interventions_of(self.runs, self.asked, known, of_trace, self.at_tokens).times(2)


def interventions_of(
    runs: Runs, asked: Workload, wanted: Sequence[Intervention], reads: Reads, at_tokens: bool
) -> Work:
    """`interp.sweep.sweep` along traces, of interventions that take nothing from another run."""
    vlm, found = runs.vlm, []
    for chosen in batches_of(asked.traces, runs.batch_size):
        batch = collate([asked.traces[row] for row in chosen])
        bound = [bind(one, vlm, batch, None, _unasked, {}) for one in wanted]
        edits = [one.edits for one in bound]
        planned, pictures = (
            PlannedSweep(vlm, batch, reads(batch), edits, at_tokens=at_tokens),
            pictures_of(vlm, batch.prompts),
        )
        cost = SweepCost(runs.arithmetic, planned, pictures)
        flops = cost.all() + sum(_zeroed(runs, one, planned) for one in bound)
        found.append(Work("sweep", len(edits) + 1, flops, held_by_sweep(runs.footprint, planned, pictures)))
    return together("sweep", found)


def _zeroed(runs: Runs, bound: Any, planned: PlannedSweep) -> int:
    """A head that is left out, through its part of W_O."""
    total = 0
    for edit in bound.edits:
        if edit.point.leaf == "hook_result" and edit.point.layer is not None:
            block, first = runs.arithmetic.blocks[edit.point.layer], edit.first_column() or 0
            total += (
                len(planned.batch) * (planned.end - first) * runs.arithmetic.row(block.out) // block.n_heads
            )
    return total


def _unasked(hook: str, index: int | None) -> Any:
    raise AssertionError(f"a plan asks for no activation of {hook}")


def _copied(work: Work, runs: Runs) -> Work:
    return replace(work.beside("a planted copy", runs.footprint.weights()), scales=work.scales)
