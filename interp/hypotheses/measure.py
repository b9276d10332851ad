"""What claims are about, measured: per example, what each component moves, its control, and what there is to move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from hooks import Address, FrankenlensError, HookedVLM
from hooks.errors import nearest
from interp.decision import DecisionSet
from interp.hypotheses.claim import Claim, ClaimError, Family
from interp.map.cells import Cell, Donor, edits_of, run_cells
from interp.map.clean import CleanBatch, CleanRuns
from interp.map.component_map import DIRECTIONS, batches_of
from interp.map.components import BEFORE_THE_DECODER, Component, cached_names, components
from interp.metrics import evaluate
from interp.pair.pair import Pair
from interp.prompts import collate
from interp.prompts.pairing import PatchBatch
from interp.questions.examples import Example
from interp.regions import parse_partition
from interp.transfer.answers import answers
from interp.transfer.grafts import Graft, grafted, require_graftable

Moved = tuple[str, str, str, tuple[str, ...]]
"""Body, role, direction, addresses."""


@dataclass(frozen=True)
class Measured:
    """One claim on every example; NaN where an example has no value.

    Attributes:
        effect: moved - recipient, of the component (minus that of `more_than`).
        control: the same with the control in the component's place.
        total: donor - recipient; of a recovery.
        units: of these.
    """

    effect: Float[np.ndarray, "*cells example"]
    control: Float[np.ndarray, "*cells example"]
    total: Float[np.ndarray, "*cells example"]
    units: str


def resolved(family: Family, vlm: HookedVLM) -> dict[str, Claim]:
    """The claims by name, with addresses for the names of regions, once every component is known to exist.

    Raises:
        FrankenlensError: a component that this model does not have, or that has no activation of its own; says which
            claim, and the line of its file.
    """
    found = {}
    for claim in family.claims:
        try:
            named = with_addresses(claim, family.partition, vlm)
            for addresses in filter(None, (named.component, named.more_than)):
                _require(claim, addresses, vlm)
            found[claim.name] = named
        except FrankenlensError as error:
            at = f"{claim.where}: " if claim.where else ""
            raise FrankenlensError(f"{at}claim {claim.name!r}: {error}") from None
    return found


def with_addresses(claim: Claim, partition: str, vlm: HookedVLM) -> Claim:
    """The claim with addresses for the names of regions; whether there are such components is not asked."""
    named = {
        part: tuple(_address(one, partition, vlm) for one in getattr(claim, part))
        for part in ("component", "more_than")
    }
    return replace(claim, **named)


def activation_components(vlm: HookedVLM, addresses: Sequence[str]) -> list[Component]:
    """What patching moves for these addresses together; a block is its attn and its mlp.

    Raises:
        FrankenlensError: no such component, or none that can be patched.
    """
    known = {component.name: component for component in components(vlm)}
    found: dict[str, Component] = {}
    for text in addresses:
        names = [text]
        if text not in known:
            address = Address.parse(text)
            names = []
            for one in address.expand():
                whole = one.kind == "blocks" and one.tower == "text" and one.sub is None
                names += [f"{one}.attn", f"{one}.mlp"] if whole else [str(one)]
        for name in names:
            if name not in known:
                raise FrankenlensError(
                    f"{text}: no activation of {name} can be moved. {nearest(name, known)}".strip()
                )
            found[name] = known[name]
    return list(found.values())


def measure(
    pair: Pair,
    claims: Mapping[str, Claim],
    examples: Sequence[Example],
    decisions: DecisionSet | None,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    clean: CleanRuns | None = None,
) -> dict[str, Measured]:
    """Every claim that can be measured; each component is moved once, however many claims name it.

    Controls: of an activation, the recipient's with a random direction of the norm that the donor's difference has at
    each token; of weights, an update as large in every tensor of the same addresses, of random direction.

    Args:
        pair: IN and RL; as they were, afterwards.
        claims: what `resolved` returns.
        examples: the prompts; every array has one value for each.
        decisions: of these examples, in their order; None: only claims of accuracy are measured.
        max_new_tokens: of greedy answers.
        batch_size: prompts a forward.
        seed: of random directions and updates.
        progress: a bar.
        clean: clean runs of one of the models, kept for its pairs with others on the same decisions.
    """
    wanted = [c for c in claims.values() if c.quantity == "accuracy" or decisions is not None]
    parts = moved_by_body(wanted)
    values: dict[tuple[str, Moved, str], np.ndarray] = {}
    total = len(parts["weights"]) + len(parts["accuracy"])
    with tqdm(desc="claims", unit="run", disable=not progress, delay=1, total=total) as bar:
        if parts["activation"] and decisions is not None:
            n = len(examples)
            _activations(pair, decisions, parts["activation"], n, batch_size, seed, values, bar, clean)
        if parts["weights"] and decisions is not None:
            _weights(pair, decisions, parts["weights"], len(examples), batch_size, seed, values, bar)
        if parts["accuracy"]:
            run = answers(pair.builder, examples, max_new_tokens=max_new_tokens, batch_size=batch_size)
            _accuracies(pair, run, parts["accuracy"], seed, values, bar)
    return {claim.name: _put_together(claim, decisions, len(examples), values) for claim in wanted}


def moved_by_body(claims: Sequence[Claim]) -> dict[str, list[Moved]]:
    """What is moved once each for some claims: as an activation, as weights, or as weights before answers."""
    parts: dict[str, list[Moved]] = {name: [] for name in ("activation", "weights", "accuracy")}
    for claim in claims:
        parts["accuracy" if claim.quantity == "accuracy" else claim.body] += _moved(claim)
    return {name: list(dict.fromkeys(found)) for name, found in parts.items()}


def _moved(claim: Claim) -> list[Moved]:
    """What has to be moved for a claim, its own component first."""
    sets = [claim.component, claim.more_than] if claim.more_than else [claim.component]
    return [(claim.body, claim.role, claim.direction, tuple(addresses)) for addresses in sets]


def _put_together(claim: Claim, decisions: DecisionSet | None, n: int, values: Mapping) -> Measured:
    kind = "accuracy" if claim.quantity == "accuracy" else "decision"
    effect, control = (
        [values[kind, moved, which] for moved in _moved(claim)] for which in ("donor", "control")
    )
    total, units = np.full(n, np.nan), "share of examples"
    if claim.quantity != "accuracy" and decisions is not None:
        rows = [decision.row for decision in decisions.decisions]
        total[rows] = decisions.rl_values - decisions.in_values
        total, units = total * _orientation(claim), decisions.metric.units
    minus = [own if len(own) == 1 else [own[0] - own[1]] for own in (effect, control)]
    return Measured(minus[0][0], minus[1][0], total, units)


def _orientation(claim: Claim) -> int:
    return 1 if claim.direction == "rl_to_in" else -1


def _address(name: str, partition: str, vlm: HookedVLM) -> str:
    try:
        Address.parse(name.removesuffix(".hook_resid_pre"))
        return name
    except FrankenlensError:
        return parse_partition(partition, vlm.n_layers).address(name)


def _require(claim: Claim, addresses: Sequence[str], vlm: HookedVLM) -> None:
    if claim.body == "weights":
        require_graftable(vlm, vlm, [Graft(tuple(addresses))])
        return
    found = activation_components(vlm, addresses)
    early = [component.name for component in found if component.point in BEFORE_THE_DECODER]
    if early and claim.role != "image":
        raise ClaimError(
            f"{early[0]} lies before the decoder, where all tokens are the image's: role: image", "role"
        )


def _activations(
    pair,
    decisions: DecisionSet,
    wanted: Sequence[Moved],
    n,
    batch_size,
    seed,
    values,
    bar,
    clean: CleanRuns | None = None,
) -> None:
    models, prompts = {"in": pair.in_, "rl": pair.rl}, decisions.prompts
    sets = {moved: activation_components(pair.in_, moved[3]) for moved in wanted}
    names = cached_names(pair.in_, [component for found in sets.values() for component in found])
    example = np.array([decision.row for decision in decisions.decisions])
    for moved in wanted:
        for which in ("donor", "control"):
            values["decision", moved, which] = np.full(n, np.nan)
    batches = list(batches_of(prompts, batch_size))
    bar.total += 2 * len(wanted) * len(batches)
    for rows in batches:
        metric = decisions.metric.select(rows)

        def ran(vlm: HookedVLM, rows: Sequence[int] = rows, metric: Any = metric) -> CleanBatch:
            batch = collate([prompts[i] for i in rows]).to(vlm.device)
            return CleanBatch(PatchBatch(batch, metric.reads(batch)), Donor(vlm, batch, names, metric))

        asked = [prompts[row] for row in rows], [], names, metric
        runs = {
            name: clean.of(*asked, partial(ran, vlm)) if clean and clean.vlm is vlm else ran(vlm)
            for name, vlm in models.items()
        }
        for direction, (donor, recipient) in DIRECTIONS.items():
            chosen = [moved for moved in wanted if moved[2] == direction]
            keys, cells = [], []
            for moved in chosen:
                for which in ("donor", "control"):
                    ends = (runs[donor].donor, runs[recipient].donor, runs[recipient].ready)
                    cell = moved_cell(*ends, sets[moved], moved[1], which, seed)
                    if cell is not None:
                        keys.append(("decision", moved, which))
                        cells.append(cell)
            if cells:
                own = runs[recipient]
                found = run_cells(models[recipient], own.ready, metric, cells, bar, own.stored)
                for key, changes in zip(keys, found, strict=True):
                    values[key][example[rows]] = changes


def moved_cell(
    donor: Donor, own: Donor, ready: PatchBatch, parts: Sequence[Component], role, which, seed: int
) -> Cell | None:
    """All components of a claim moved at once."""
    where = ready.where(role)
    rows = where.any(-1)
    if not rows.any():
        return None
    kind, edits = "random" if which == "control" else "donor", []
    for component in parts:
        place = None if component.point in BEFORE_THE_DECODER else where
        edits += edits_of(own, donor, component, place, ready, kind, seed)
    return Cell(which, 0, 0, tuple(edits), rows)


def _grafts(pair: Pair, moved: Moved, seed: int):
    donor, recipient = ({"in": pair.in_, "rl": pair.rl}[name] for name in DIRECTIONS[moved[2]])
    whole = Graft(moved[3])
    return recipient, donor, {"donor": whole, "control": replace(whole, form="random", seed=seed)}


def _weights(pair, decisions: DecisionSet, wanted: Sequence[Moved], n, batch_size, seed, values, bar) -> None:
    rows = [decision.row for decision in decisions.decisions]
    clean = {"rl_to_in": decisions.in_values, "in_to_rl": decisions.rl_values}
    for moved in wanted:
        recipient, donor, grafts = _grafts(pair, moved, seed)
        for which, graft in grafts.items():
            with grafted(recipient, donor, graft) as vlm:
                found = evaluate(vlm, decisions.prompts, decisions.metric, batch_size)
            own = values["decision", moved, which] = np.full(n, np.nan)
            own[rows] = found - clean[moved[2]]
        bar.update()


def _accuracies(pair: Pair, run, wanted: Sequence[Moved], seed, values, bar) -> None:
    clean: dict[str, np.ndarray] = {}
    for moved in wanted:
        recipient, donor, grafts = _grafts(pair, moved, seed)
        if moved[2] not in clean:
            clean[moved[2]] = np.array(run(recipient).right)
        for which, graft in grafts.items():
            with grafted(recipient, donor, graft) as vlm:
                values["accuracy", moved, which] = np.array(run(vlm).right) - clean[moved[2]]
        bar.update()
