"""The component map: every component patched at every role, in both directions, with its controls.

`component_map` moves activations between the two models of a pair (RL into IN: sufficient? IN into RL: necessary?),
`patch` between two prompts of one model. Both return the effects; `interp.map.summary.summarise` turns them into
recoveries with intervals.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import batched, in_parts
from interp.map.batch import Batch, rows_at_once
from interp.map.cells import KINDS
from interp.map.clean import CleanRuns
from interp.map.components import (
    BEFORE_THE_DECODER,
    POINTS,
    Component,
    components,
    lacking,
)
from interp.metrics import Metric
from interp.pair.agreement import entering, model_differences
from interp.prompts import Prompt
from interp.prompts.pairing import beside, image_shapes, partners
from interp.prompts.roles import ROLES
from interp.questions.examples import cluster_of, with_looked_at
from interp.results.store import Store, begun, fingerprint, part

if TYPE_CHECKING:
    from interp.decision import DecisionSet
    from interp.pair.pair import Pair

DIRECTIONS = {"rl_to_in": ("rl", "in"), "in_to_rl": ("in", "rl")}
MAP_POINTS = tuple(point for point in POINTS if point not in ("z", "expert"))
"""Patched where nothing else is asked for; experts, of which there may be thousands, only by name."""
RANDOM = 1
"""Random directions that every cell is tried with, each example with its own."""
FURTHER = ("other", "self")
"""Controls beside random directions: the donor's difference on another example, and the recipient itself."""


def component_map(
    pair: "Pair",
    decisions: "DecisionSet",
    directions: Sequence[str] = tuple(DIRECTIONS),
    points: Sequence[str] = MAP_POINTS,
    roles: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
    keep: Store | None = None,
    *,
    n_random: int = RANDOM,
    further: Sequence[str] = FURTHER,
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> xr.Dataset:
    """Patch every component of a pair at every role, on the prompts of `decisions`.

    Args:
        pair: IN and RL, opened.
        decisions: what is measured, and the prompts up to each decision.
        directions: "rl_to_in" (sufficient?), "in_to_rl" (necessary?).
        points: see `interp.map.components.components`; "expert" (every expert of every layer) is patched where it is
            named.
        roles: of `ROLES`, "decision" and "all"; by default those that occur.
        batch_size: prompts a forward.
        progress: show a bar.
        keep: where it is kept what is finished, batch by batch.
        n_random: random directions of every cell and example.
        further: which of the two further controls are run as well, of `FURTHER`; NaN where one is not.
        seed: of the random directions.
        clean: clean runs of one of the two models, kept for maps of it against others on the same prompts.

    Returns:
        Variables effect [direction component role example] (patched - recipient, in the metric's units); controls, of
        the same: control_random [direction draw component role example] (a random direction of the norm that the
        donor's difference has at each token, added to the recipient's activation) and control_other [as effect] (the
        donor's difference on another example added to it); control_self [direction component] (largest |effect| of
        the component from the same model, which is exactly 0; NaN where no prompt has it); recipient and donor
        [direction example]; coordinates point, layer, head on component; all examples that were looked at
        (`interp.questions.examples.with_looked_at`).

    Raises:
        FrankenlensError: an unknown direction, point or role; no decision qualifies; no random direction.
    """
    for direction in directions:
        if direction not in DIRECTIONS:
            raise FrankenlensError(f"{direction!r} is no direction; choose of {', '.join(DIRECTIONS)}.")
    decisions.require_some()
    for kind in further:
        if kind not in FURTHER:
            raise FrankenlensError(f"{kind!r} is no further control; choose of {', '.join(FURTHER)}.")
    prompts = {"in": decisions.prompts, "rl": decisions.prompts}
    models = {"in": pair.in_, "rl": pair.rl}
    ways = {d: DIRECTIONS[d] for d in directions}
    kinds = ("donor", "random", *further)
    settings = {"kinds": kinds, "n_random": n_random, "seed": seed, "keep": keep, "clean": clean}
    found = _map(models, prompts, decisions.metric, ways, points, roles, batch_size, progress, **settings)
    return with_looked_at(found, decisions.examples)


def patch(
    vlm: HookedVLM,
    clean: Sequence[Prompt],
    corrupt: Sequence[Prompt],
    metric: Metric,
    points: Sequence[str] = MAP_POINTS,
    roles: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
    *,
    donor: HookedVLM | None = None,
    n_random: int = RANDOM,
    seed: int = 0,
) -> xr.Dataset:
    """Patch one model's activations on clean prompts into its runs on corrupt ones (counterfactual images, say).

    With a donor, the clean prompts are run by it: on the same prompts twice, that is `component_map` in one direction,
    for models whose prompts you make yourself (`Prompt.from_inputs`).

    Args:
        vlm: the opened model.
        clean: prompts the activations come from.
        corrupt: prompts they go to, row by row with the same roles at the same positions.
        metric: read on the corrupt run; see `interp.metrics`.
        points, roles, batch_size: as in `component_map`.
        donor: what runs on the clean prompts; by default `vlm`.
        n_random, seed: as in `component_map`.

    Returns:
        As `component_map`, with the one direction "clean_to_corrupt".

    Raises:
        FrankenlensError: a row whose clean and corrupt tokens do not line up; a donor of another architecture.
    """
    differences = [] if donor is None else model_differences(vlm.model, donor.model, vlm.opening)
    if found := entering(differences):
        raise FrankenlensError(
            f"recipient and donor are no pair; they differ in {'; '.join(map(str, found[:3]))}. Give a checkpoint "
            "of the same architecture."
        )
    if len(clean) != len(corrupt):
        raise FrankenlensError(f"{len(clean)} clean and {len(corrupt)} corrupt prompts; they go in pairs.")
    for row, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if one.roles != other.roles or image_shapes(one) != image_shapes(other):
            raise FrankenlensError(
                f"row {row} ({one.example.id} / {other.example.id}): {len(one)} and {len(other)} tokens,"
                " other roles, or images of other sizes;"
                " the two prompts must line up token by token. Give images of equal size and the same question."
            )
    models = {"clean": vlm if donor is None else donor, "corrupt": vlm}
    prompts = {"clean": clean, "corrupt": corrupt}
    direction = {"clean_to_corrupt": ("clean", "corrupt")}
    return _map(
        models, prompts, metric, direction, points, roles, batch_size, progress, n_random=n_random, seed=seed
    )


def _map(
    models: Mapping[str, HookedVLM],
    prompts: Mapping[str, Sequence[Prompt]],
    metric: Metric,
    directions: Mapping[str, tuple[str, str]],
    points: Sequence[str],
    roles: Sequence[str] | None,
    batch_size: int,
    progress: bool,
    *,
    kinds: Sequence[str] = KINDS,
    n_random: int = RANDOM,
    seed: int = 0,
    keep: Store | None = None,
    clean: CleanRuns | None = None,
) -> xr.Dataset:
    """`kinds`: what is put in a cell's place; what is not asked for stays NaN."""
    if n_random < 1:
        raise FrankenlensError(
            f"n_random is {n_random}; a cell needs at least one random direction beside it"
        )
    first = next(iter(prompts.values()))
    if not first:
        raise FrankenlensError("no prompts are given, so there is nothing to patch.")
    roles = roles_of(first, roles)
    for vlm in models.values():
        vlm.require("positions", "a component map")
    images = any(prompt.has_image for prompt in first)
    offered = [components(vlm, points) for vlm in models.values()]
    wanted = [
        one
        for one in offered[0]
        if all(one in others for others in offered) and (images or one.point not in BEFORE_THE_DECODER)
    ]
    if not wanted:
        told = "; ".join(lacking(next(iter(models.values())), points, images))
        raise FrankenlensError(f"there is nothing to patch: {told}. Choose others of {', '.join(POINTS)}.")
    shape = (len(directions), len(wanted), len(roles), len(first))
    kept = {
        kind: np.full((shape[0], n_random, *shape[1:]) if kind == "random" else shape, np.nan)
        for kind in KINDS
    }
    ends = np.full((2, len(directions), len(first)), np.nan)
    seeds = range(seed, seed + n_random)
    size = rows_at_once(models, wanted, max(map(len, first)), kinds, batch_size)
    total = _n_runs(wanted, roles, kinds, n_random) * len(directions) * -(-len(first) // size)
    # all directions go between the same two models, whose prompts line up
    _, recipient = next(iter(directions.values()))
    partner = partners(prompts[recipient]) if "other" in kinds else torch.full((len(first),), -1)
    with tqdm(total=total, desc="patching", unit="run", disable=not progress) as bar:

        def job(rows: Sequence[int]) -> Batch:
            some = {name: [own[i] for i in rows] for name, own in prompts.items()}
            others = {name: beside(own, rows, partner) for name, own in prompts.items()}
            return Batch(
                models,
                some,
                others,
                partner[list(rows)],
                metric.select(rows),
                directions,
                wanted,
                roles,
                kinds,
                seeds,
                bar,
                clean,
            )

        def of(one: Batch) -> str:
            names = [component.name for component in wanted]
            return fingerprint(names, roles, list(directions), list(kinds), list(seeds), one.about)

        def measure(rows: Sequence[int]) -> dict[str, np.ndarray]:
            one = job(rows)
            return part(keep, f"map-{rows[0]:06d}-{len(rows)}", one.run, of(one))

        def done(rows: Sequence[int]) -> int:
            return begun(keep, f"map-{rows[0]:06d}", len(rows), lambda n: of(job(rows[:n])))

        for rows, found in in_parts(in_order(first), size, measure, done):
            for kind in KINDS:
                kept[kind][..., rows] = found[kind]
            ends[..., rows] = found["ends"]
        bar.total = bar.n  # roles that no row of a batch has are not run
        bar.refresh()
    found = _dataset(kept, ends, list(directions), wanted, roles, [p.example for p in first], metric)
    told = {why: n for vlm in models.values() for why, n in lacking(vlm, points, images).items()}
    found.attrs["lacking"] = json.dumps(told)
    return found


def roles_of(prompts: Sequence[Prompt], roles: Sequence[str] | None) -> list[str]:
    if roles is None:
        present = {role for prompt in prompts for role in prompt.roles}
        return [*(role for role in ROLES if role in present), "decision", "all"]
    valid = (*ROLES, "decision", "all")
    for role in roles:
        if role not in valid:
            raise FrankenlensError(f"{role!r} is no role; choose of {', '.join(valid)}.")
    return list(roles)


def batches_of(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Row numbers by batch; rows of the same length and roles stand together, so that little is padding."""
    yield from map(list, batched(in_order(prompts), batch_size))


def in_order(prompts: Sequence[Prompt]) -> list[int]:
    """Row numbers; those that share a batch well stand together."""
    return sorted(
        range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i].roles, image_shapes(prompts[i]), i)
    )


def _n_runs(wanted: Sequence[Component], roles: Sequence[str], kinds: Sequence[str], n_random: int) -> int:
    early = sum(component.point in BEFORE_THE_DECODER for component in wanted)
    cells = (len(wanted) - early) * len(roles) + early
    of_kind = {"donor": cells, "random": n_random * cells, "other": cells, "self": len(wanted)}
    return sum(of_kind[kind] for kind in kinds)


def _dataset(kept, ends, directions, wanted, roles, examples, metric) -> xr.Dataset:
    dims = ("direction", "component", "role", "example")
    units = {"units": metric.units}
    itself = np.fmax.reduce(np.abs(kept["self"]), axis=(2, 3))
    return xr.Dataset(
        {
            "effect": (dims, kept["donor"], units),
            "control_random": ((dims[0], "draw", *dims[1:]), kept["random"], units),
            "control_other": (dims, kept["other"], units),
            "control_self": (dims[:2], itself, units),
            "recipient": (("direction", "example"), ends[0], units),
            "donor": (("direction", "example"), ends[1], units),
        },
        coords={
            "direction": directions,
            "component": [c.name for c in wanted],
            "role": roles,
            "example": [example.id for example in examples],
            "cluster": ("example", [cluster_of(example) for example in examples]),
            "point": ("component", [c.point for c in wanted]),
            "layer": ("component", [-1 if c.layer is None else c.layer for c in wanted]),
            "head": ("component", [-1 if c.head is None else c.head for c in wanted]),
        },
        attrs={"metric": metric.name, "units": metric.units},
    )
