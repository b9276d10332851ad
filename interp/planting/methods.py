"""Every localizing method of the toolkit with one face: a pair in, one number per component and example out.

An effect is in nats of the pair's soft metric (`interp.metrics.SoftDifference`), except for the comparison of weights,
whose relative norms have no example axis. NaN: the method has nothing to say about such a component.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM, weight_slices
from hooks.errors import nearest
from interp.decision import DecisionSet
from interp.map.attribution import attribute
from interp.map.cells import Donor, cells_of, run_cells
from interp.map.component_map import DIRECTIONS, batches_of
from interp.map.components import BEFORE_THE_DECODER, Component, cached_names
from interp.metrics import evaluate
from interp.pair.pair import Pair
from interp.prompts import collate
from interp.prompts.pairing import PatchBatch
from interp.sweep import Intervention, sweep
from interp.transfer.grafts import Graft, grafted

Effects = Float[np.ndarray, "component example"]
INTO, OUT = "rl_to_in", "in_to_rl"
_ROLES = ("all", "image")


@dataclass(eq=False)
class Subject:
    """What the methods look at.

    Attributes:
        pair, decisions: IN and RL, and soft decisions of theirs.
        wanted: the components to choose among.
        batch_size: prompts a forward.
    """

    pair: Pair
    decisions: DecisionSet
    wanted: Sequence[Component]
    batch_size: int = 32
    _patched: dict[tuple[str, bool], Effects] = field(default_factory=dict, init=False, repr=False)

    @property
    def models(self) -> dict[str, HookedVLM]:
        """IN and RL by name."""
        return {"in": self.pair.in_, "rl": self.pair.rl}

    def patched(self, direction: str, inner: bool) -> Effects:
        """What `patched` finds, computed once."""
        key = (direction, inner)
        if key not in self._patched:
            self._patched[key] = _patched(self, direction, inner)
        return self._patched[key]


@dataclass(frozen=True)
class Method:
    """A localizing method.

    Attributes:
        run: what it finds, [component example].
        moves: whether it moves something between the models, so that a recovery, and its refusal, is about it.
        tests: whether its values are per example, so that something can be claimed of them.
    """

    run: Callable[[Subject], Effects]
    moves: bool = True
    tests: bool = True


def patched(subject: Subject, direction: str, inner: bool = False) -> Effects:
    """Activation patching at all tokens: patched - recipient.

    With `inner` what is moved is not the component's output (a head's result, mlp_out) but what comes before its
    output matrix: z, and the neurons' activations.
    """
    return subject.patched(direction, inner)


def patched_both_ways(subject: Subject) -> Effects:
    """The mean of what moving in adds and moving out takes away."""
    return (subject.patched(INTO, False) - subject.patched(OUT, False)) / 2


def attributed(subject: Subject, direction: str, steps: int = 0) -> Effects:
    """Attribution patching at all tokens, or integrated gradients."""
    points = tuple(dict.fromkeys(c.point for c in subject.wanted if c.point not in BEFORE_THE_DECODER))
    estimates = attribute(
        subject.pair,
        subject.decisions,
        (direction,),
        points,
        ["all"],
        steps,
        batch_size=subject.batch_size,
        progress=False,
    )
    effect = estimates["effect"].sel(direction=direction, role="all")
    return effect.reindex(component=[component.name for component in subject.wanted]).to_numpy()


def transplanted(subject: Subject, direction: str) -> Effects:
    """Grafts: the component's weights moved; grafted - recipient."""
    decisions = subject.decisions
    donor, recipient = (subject.models[name] for name in DIRECTIONS[direction])
    clean = decisions.in_values if direction == INTO else decisions.rl_values
    found = np.empty((len(subject.wanted), len(decisions)))
    for i, component in enumerate(subject.wanted):
        with grafted(recipient, donor, Graft((component.name,))):
            now = evaluate(recipient, decisions.prompts, decisions.metric, subject.batch_size)
        found[i] = now - clean
    return found


def skipped(subject: Subject) -> Effects:
    """What leaving a component out does to RL, minus what it does to IN."""
    return _apart(subject, [left_out(component) for component in subject.wanted])


def cut(subject: Subject) -> Effects:
    """What cutting a head's attention to the image does to RL, minus what it does to IN."""
    return _apart(subject, [cut_off(component) for component in subject.wanted])


def compared(subject: Subject) -> Effects:
    """Norm of the update of a component's weights, relative to theirs in IN (`interp.comparison.by_address`)."""
    pair = subject.pair
    return np.array([[relative_norm(pair.in_, pair.rl, component.name)] for component in subject.wanted])


@torch.no_grad()
def relative_norm(in_: HookedVLM, rl: HookedVLM, address: str) -> float:
    """|W_RL - W_IN| / |W_IN| over all weights that an address owns; NaN where these are all 0 in IN."""
    own, theirs = (dict(v.model.named_parameters(remove_duplicate=False)) for v in (in_, rl))
    moved = size = 0.0
    for piece in weight_slices(in_.model, in_.anatomy, address):
        before = piece.of(own[piece.parameter]).double()
        moved += float((piece.of(theirs[piece.parameter]).to(before) - before).square().sum())
        size += float(before.square().sum())
    return (moved / size) ** 0.5 if size else float("nan")


METHODS: dict[str, Method] = {
    "patch, both ways": Method(patched_both_ways),
    "patch RL → IN": Method(partial(patched, direction=INTO)),
    "patch IN → RL": Method(partial(patched, direction=OUT)),
    "patch z RL → IN": Method(partial(patched, direction=INTO, inner=True)),
    "patch z IN → RL": Method(partial(patched, direction=OUT, inner=True)),
    "attribution RL → IN": Method(partial(attributed, direction=INTO)),
    "attribution IN → RL": Method(partial(attributed, direction=OUT)),
    "graft RL → IN": Method(partial(transplanted, direction=INTO)),
    "graft IN → RL": Method(partial(transplanted, direction=OUT)),
    "skip": Method(skipped, moves=False),
    "knockout": Method(cut, moves=False),
    "compare": Method(compared, moves=False, tests=False),
}
"""By name. `z` stands for what comes before a component's output matrix."""
INTEGRATED_STEPS = 4
"""Points on the way of integrated gradients."""
INTEGRATED = {
    "integrated gradients RL → IN": Method(partial(attributed, direction=INTO, steps=INTEGRATED_STEPS)),
    "integrated gradients IN → RL": Method(partial(attributed, direction=OUT, steps=INTEGRATED_STEPS)),
}
"""Forty times the cost of `attribution`, so only where it is asked for."""


def chosen(names: Sequence[str]) -> dict[str, Method]:
    """Methods by name.

    Raises:
        FrankenlensError: an unknown one, or none.
    """
    known = METHODS | INTEGRATED
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise FrankenlensError(
                f"there is no method {name!r}; choose of {', '.join(known)}. {hint}".strip()
            )
    if not names:
        raise FrankenlensError(f"no method is named; choose of {', '.join(known)}")
    return {name: known[name] for name in names}


def _patched(subject: Subject, direction: str, inner: bool) -> Effects:
    donor, recipient = DIRECTIONS[direction]
    decisions, models = subject.decisions, subject.models
    moved = {i: inner_of(one) if inner else one for i, one in enumerate(subject.wanted)}
    places = [i for i, one in moved.items() if one is not None]
    parts = [one for one in moved.values() if one is not None]
    found = np.full((len(subject.wanted), len(decisions)), np.nan)
    for rows in batches_of(decisions.prompts, subject.batch_size):
        select = decisions.metric.select(rows)
        batch = collate([decisions.prompts[i] for i in rows]).to(subject.pair.in_.device)
        ends = {
            name: Donor(models[name], batch, cached_names(models[recipient], parts), select)
            for name in (donor, recipient)
        }
        ready = PatchBatch(batch, select.reads(batch))
        cells = [
            cell
            for cell in cells_of(ends[donor], ends[recipient], ready, parts, _ROLES, ["donor"])
            if _ROLES[cell.role] == _role(parts[cell.component])
        ]
        with tqdm(disable=True) as bar:
            values = run_cells(models[recipient], ready, select, cells, bar)
        for cell, value in zip(cells, values, strict=True):
            found[places[cell.component], rows] = value
    return found


def _role(component: Component) -> str:
    """All of a component's tokens."""
    return "image" if component.point in BEFORE_THE_DECODER else "all"


def _apart(subject: Subject, interventions: Sequence[Intervention | None]) -> Effects:
    prompts, metric = subject.decisions.prompts, subject.decisions.metric
    found = np.full((len(interventions), len(prompts)), np.nan)
    known = [i for i, one in enumerate(interventions) if one is not None]
    if not known:
        return found
    done = [one for one in interventions if one is not None]
    changes = []
    for vlm in (subject.pair.in_, subject.pair.rl):
        result = sweep(vlm, prompts, done, metric, batch_size=subject.batch_size, progress=False)
        changes.append((result["value"] - result["clean"]).isel(metric=0).to_numpy())
    found[known] = changes[1] - changes[0]
    return found


def inner_of(component: Component) -> Component | None:
    """What comes before a component's output matrix; None where that is not known."""
    if component.point == "head":
        return replace(component, hooks=(component.hook.replace("hook_result", "hook_z"),))
    if component.point == "mlp_out":
        return replace(component, hooks=(component.hook.replace("hook_mlp_out", "mlp.hook_post"),))
    return None


def left_out(component: Component) -> Intervention | None:
    """The component adds nothing; None for the projector."""
    if component.point in ("head", "expert"):
        return Intervention(component.hook, "zero", index=component.head)
    return None if component.point == "projector" else Intervention(component.hook, "skip")


def cut_off(component: Component) -> Intervention | None:
    """A head sees no image; None for what is no head."""
    if component.point != "head":
        return None
    hook = component.hook.replace("hook_result", "hook_attn_scores")
    return Intervention(hook, "knockout", "all", index=component.head, source="image")
