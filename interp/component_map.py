"""The component map: every component patched at every role, in both directions, with two controls.

`component_map` moves activations between the two models of a pair (RL into IN: sufficient? IN into RL: necessary?),
`patch` between two prompts of one model. Both return the effects; `interp.summary.summarise` turns them into
recoveries with intervals.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from interp.metrics import Metric
from interp.patching import (
    BEFORE_THE_DECODER,
    POINTS,
    Component,
    PatchBatch,
    borrowed,
    cached_names,
    components,
    image_shapes,
    partners,
)
from interp.prompts import Prompt, PromptBatch, collate
from interp.rerun import before_the_decoder
from interp.roles import ROLES
from interp.sweep.activations import activation_of
from interp.sweep.batch import BatchSweep
from interp.sweep.edits import Edit, New, Span

if TYPE_CHECKING:
    from interp.decision import DecisionSet
    from interp.pair import Pair

DIRECTIONS = {"rl_to_in": ("rl", "in"), "in_to_rl": ("in", "rl")}
MAP_POINTS = tuple(point for point in POINTS if point != "z")


def component_map(
    pair: "Pair",
    decisions: "DecisionSet",
    directions: Sequence[str] = tuple(DIRECTIONS),
    points: Sequence[str] = MAP_POINTS,
    roles: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Patch every component of a pair at every role, on the prompts of `decisions`.

    Args:
        pair: IN and RL, opened.
        decisions: what is measured, and the prompts up to each decision.
        directions: "rl_to_in" (sufficient?), "in_to_rl" (necessary?).
        points: see `interp.patching.components`.
        roles: of `ROLES`, "decision" and "all"; by default those that occur.
        batch_size: prompts a forward.

    Returns:
        Variables effect and control_other [direction component role example] (patched - recipient, in the metric's
        units), control_self [direction component] (largest |effect| of the component from the same model, which is
        exactly 0; NaN where no prompt has it), recipient and donor [direction example]; coordinates point, layer,
        head on component.

    Raises:
        FrankenlensError: an unknown direction, point or role; no decision qualifies.
    """
    for direction in directions:
        if direction not in DIRECTIONS:
            raise FrankenlensError(f"{direction!r} is no direction; choose of {', '.join(DIRECTIONS)}.")
    prompts = {"in": decisions.prompts, "rl": decisions.prompts}
    models = {"in": pair.in_, "rl": pair.rl}
    return _map(
        models,
        prompts,
        decisions.metric,
        {d: DIRECTIONS[d] for d in directions},
        points,
        roles,
        batch_size,
        progress,
    )


def patch(
    vlm: HookedVLM,
    clean: Sequence[Prompt],
    corrupt: Sequence[Prompt],
    metric: Metric,
    points: Sequence[str] = MAP_POINTS,
    roles: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Patch one model's activations on clean prompts into its runs on corrupt ones (counterfactual images, say).

    Args:
        vlm: the opened model.
        clean: prompts the activations come from.
        corrupt: prompts they go to, row by row with the same roles at the same positions.
        metric: read on the corrupt run; see `interp.metrics`.
        points, roles, batch_size: as in `component_map`.

    Returns:
        As `component_map`, with the one direction "clean_to_corrupt".

    Raises:
        FrankenlensError: a row whose clean and corrupt tokens do not line up.
    """
    if len(clean) != len(corrupt):
        raise FrankenlensError(f"{len(clean)} clean and {len(corrupt)} corrupt prompts; they go in pairs.")
    for row, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if one.roles != other.roles or image_shapes(one) != image_shapes(other):
            raise FrankenlensError(
                f"row {row} ({one.example.id} / {other.example.id}): {len(one)} and {len(other)} tokens,"
                " other roles, or images of other sizes;"
                " the two prompts must line up token by token. Give images of equal size and the same question."
            )
    models, prompts = {"clean": vlm, "corrupt": vlm}, {"clean": clean, "corrupt": corrupt}
    direction = {"clean_to_corrupt": ("clean", "corrupt")}
    return _map(models, prompts, metric, direction, points, roles, batch_size, progress)


def _map(
    models: Mapping[str, HookedVLM],
    prompts: Mapping[str, Sequence[Prompt]],
    metric: Metric,
    directions: Mapping[str, tuple[str, str]],
    points: Sequence[str],
    roles: Sequence[str] | None,
    batch_size: int,
    progress: bool,
) -> xr.Dataset:
    first = next(iter(prompts.values()))
    if not first:
        raise FrankenlensError(
            "no prompt qualifies for this decision, so there is nothing to patch; see its counts."
        )
    roles = _roles(first, roles)
    wanted = components(next(iter(models.values())), points)
    shape = (len(directions), len(wanted), len(roles), len(first))
    effect, other = np.full(shape, np.nan), np.full(shape, np.nan)
    itself = np.full(shape[:2], np.nan)
    ends = np.full((2, len(directions), len(first)), np.nan)
    total = _n_runs(wanted, roles) * len(directions) * -(-len(first) // batch_size)
    with tqdm(total=total, desc="patching", unit="run", disable=not progress) as bar:
        for number, rows in enumerate(_batches(first, batch_size)):
            select = metric.select(rows)
            ready, donors = {}, {}
            for name, vlm in models.items():
                batch = collate([prompts[name][i] for i in rows]).to(vlm.device)
                ready[name] = PatchBatch(batch, select.reads(batch), partners(batch))
                donors[name] = _Donor(vlm, batch, cached_names(wanted), select)
            for d, (donor, recipient) in enumerate(directions.values()):
                cells = _cells(donors[donor], donors[recipient], ready[recipient], wanted, roles)
                found = _run(models[recipient], ready[recipient], select, cells, number == 0, bar)
                for cell, values in zip(cells, found, strict=True):
                    if cell.kind == "self":
                        itself[d, cell.component] = np.fmax(
                            itself[d, cell.component], np.fmax.reduce(np.abs(values), axis=None)
                        )
                    else:
                        kept = effect if cell.kind == "donor" else other
                        kept[d, cell.component, cell.role, rows] = values
                ends[0, d, rows], ends[1, d, rows] = donors[recipient].metric, donors[donor].metric
        bar.total = bar.n  # roles that no row of a batch has are not run
        bar.refresh()
    return _dataset(
        effect, other, itself, ends, list(directions), wanted, roles, [p.example.id for p in first], metric
    )


class _Donor:
    """A model's clean activations and metric on a batch."""

    def __init__(self, vlm: HookedVLM, batch: PromptBatch, names: Sequence[str], metric: Metric) -> None:
        image = bool(batch.mask("image").any())
        kept = [name for name in names if image or not before_the_decoder(name)]
        with torch.no_grad():
            output, self._cache = vlm.run_with_cache(batch.inputs, kept, use_cache=False)
        self._vlm = vlm
        self.metric = metric(output.logits, batch).double().cpu().numpy()

    def activation(self, hook: str, head: int | None) -> Float[Tensor, "..."]:
        """An activation; a head's result goes through this model's own W_O."""
        return activation_of(self._vlm, self._cache.__getitem__, hook, head)


@dataclass(frozen=True)
class _Cell:
    """One patch: a component at a role, from the donor, from the donor on another example, or from itself."""

    kind: str
    component: int
    role: int
    edits: tuple[Edit, ...]
    rows: Bool[Tensor, " batch"]


def _cells(
    donor: _Donor, own: _Donor, ready: PatchBatch, wanted: Sequence[Component], roles: Sequence[str]
) -> list[_Cell]:
    cells = []
    whole = torch.ones_like(ready.partner, dtype=torch.bool)
    for kind in ("donor", "other", "self"):
        usable = ready.partner >= 0 if kind == "other" else whole
        for c, component in enumerate(wanted):
            early = component.point in BEFORE_THE_DECODER
            for r, role in enumerate(roles if kind != "self" else [None]):
                where = ready.where(role or ("image" if early else "all"))
                present = usable & where.any(-1)
                if (early and role not in ("image", None)) or not present.any():
                    continue
                source = own if kind == "self" else donor
                borrow = ready if kind == "other" else None
                edits = _edits(own, source, component, None if early else where, early, borrow)
                cells.append(_Cell(kind, c, r, edits, present))
    return cells


def _edits(
    own: _Donor,
    source: _Donor,
    component: Component,
    where: Bool[Tensor, "batch pos"] | None,
    early: bool,
    borrow: PatchBatch | None,
) -> tuple[Edit, ...]:
    def new(name: str) -> New:
        def replacement(activation: Tensor, span: Span) -> Tensor:
            value = source.activation(name, component.head)
            value = value if borrow is None else borrowed(value, early, borrow)
            return (value if early else value[:, span.columns]).to(activation)

        return replacement

    points = own._vlm.hook_points
    return tuple(Edit(points[name], new(name), where, component.head) for name in component.hooks)


def _run(
    vlm: HookedVLM, ready: PatchBatch, metric: Metric, cells: Sequence[_Cell], check: bool, bar: tqdm
) -> list[Float[np.ndarray, " batch"]]:
    """metric(patched) - metric(clean) of each cell, NaN for the examples that it does not touch."""

    def read(logits: Tensor, batch: PromptBatch) -> Tensor:
        return metric(logits, batch)[None]

    sweep = BatchSweep(vlm, ready.batch, ready.reads, read, [cell.edits for cell in cells], check=check)
    found = [np.full(len(ready.batch), np.nan) for _ in cells]
    for number, values in sweep.run(range(len(cells))):
        rows = cells[number].rows.cpu().numpy()
        found[number][rows] = (values - sweep.clean)[0].double().cpu().numpy()[rows]
        bar.update()
    return found


def _roles(prompts: Sequence[Prompt], roles: Sequence[str] | None) -> list[str]:
    if roles is None:
        present = {role for prompt in prompts for role in prompt.roles}
        return [*(role for role in ROLES if role in present), "decision", "all"]
    valid = (*ROLES, "decision", "all")
    for role in roles:
        if role not in valid:
            raise FrankenlensError(f"{role!r} is no role; choose of {', '.join(valid)}.")
    return list(roles)


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Row numbers by batch; rows with the same roles stand together, so that they can be each other's control."""
    order = sorted(
        range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i].roles, image_shapes(prompts[i]), i)
    )
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _n_runs(wanted: Sequence[Component], roles: Sequence[str]) -> int:
    early = sum(component.point in BEFORE_THE_DECODER for component in wanted)
    cells = (len(wanted) - early) * len(roles) + early * ("image" in roles)
    return 2 * cells + len(wanted)


def _dataset(effect, other, itself, ends, directions, wanted, roles, examples, metric) -> xr.Dataset:
    dims = ("direction", "component", "role", "example")
    units = {"units": metric.units}
    return xr.Dataset(
        {
            "effect": (dims, effect, units),
            "control_other": (dims, other, units),
            "control_self": (dims[:2], itself, units),
            "recipient": (("direction", "example"), ends[0], units),
            "donor": (("direction", "example"), ends[1], units),
        },
        coords={
            "direction": directions,
            "component": [c.name for c in wanted],
            "role": roles,
            "example": examples,
            "point": ("component", [c.point for c in wanted]),
            "layer": ("component", [-1 if c.layer is None else c.layer for c in wanted]),
            "head": ("component", [-1 if c.head is None else c.head for c in wanted]),
        },
        attrs={"metric": metric.name, "units": metric.units},
    )
