"""Which information routes did RL open or close? The same cuts in IN and RL, on the same prompts, paired.

The effect of a cut is the metric under it minus the clean metric: negative where the decision uses the route. Beside
every cut stands a control that takes away as many attention edges in the same layers, drawn at random: at the same
queries, from keys of other places, where each query sees enough of them ("keys"), otherwise anywhere in the row
("edges"). Which of the two it is is decided for a route as a whole, and printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import in_shared_parts
from interp.decision import Change, changed_weights
from interp.knockout.attached import missing
from interp.knockout.cut import Knockout, layers_label, require_cuts
from interp.knockout.effects import CutBatch, OfRows, cut_lanes, rows_fitting
from interp.knockout.lanes import Lane
from interp.knockout.random_edges import control_kinds, controls
from interp.metrics import AnswerLogProbability, Metric
from interp.pair.pair import Pair
from interp.prompts import Prompt, PromptBatch, collate
from interp.questions.examples import Example, cluster_of

ROUTES = {
    "image -> question": Knockout("image", "question"),
    "image -> reasoning": Knockout("image", "reasoning"),
    "image -> last": Knockout("image", "before answer"),
    "question -> reasoning": Knockout("question", "reasoning"),
    "question -> last": Knockout("question", "before answer"),
    "reasoning -> last": Knockout("reasoning", "before answer"),
}
"""Between image, question, reasoning and the last token before the answer, which predicts its first word."""
PAPER_ROUTES = ("image -> question", "image -> last", "question -> last")
"""Those of 2411.18620, whose prompts hold no reasoning."""


def up_to_the_answer(trace: Prompt) -> tuple[Prompt | None, str]:
    """A trace up to the first token of its answer: what `routes` reads; or None, and why there is none."""
    read = trace.trace
    if not read.ok:
        return None, f"the trace does not parse: {read.why}"
    answer = trace.positions("answer")
    if not len(answer):
        return None, "the answer lies within a token of another role"
    return trace.truncated(int(answer[0]) + 1), ""


def routes(
    pair: Pair,
    prompts: Sequence[Prompt],
    cuts: Mapping[str, Sequence[Knockout]],
    metric: Metric | None = None,
    *,
    nulls: Mapping[str, tuple[HookedVLM, Change]] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Every route cut in every window of layers, in IN and in RL, with its control.

    Args:
        pair: IN and RL.
        prompts: what both read (see `up_to_the_answer`).
        cuts: route to its knockouts, one per window of layers; the same windows for every route.
        metric: by default the log-probability of the answer's tokens.
        nulls: further models by name: one of the pair's, and how its weights are changed (`interp.decision`).
        seed: of the controls' edges, which are the same for all models and windows.
        batch_size: prompts that run together.
        progress: show a bar.

    Returns:
        value, control [model route window example] and clean [model example] in the metric's units, NaN where left
        out; why [example] ("" where the prompt counts); n_edges [route example], cut in one layer and head; coordinate
        control_kind of the routes ("keys", "edges", or "none" where a prompt has too few other edges).

    Raises:
        FrankenlensError: no prompts, no routes, windows that differ between routes, a layer or head that the models do
            not have, or no prompt in which every route exists.
    """
    wanted = metric if metric is not None else AnswerLogProbability()
    flat = _flat(pair, prompts, cuts)
    why = _why(prompts, [group[0] for group in cuts.values()], wanted)
    rows = [row for row, reason in enumerate(why) if not reason]
    if not rows:
        raise FrankenlensError(f"no prompt has every route; the first of them: {why[0]}")
    readers = {"in": (pair.in_, None), "rl": (pair.rl, None)} | dict(nulls or {})
    kinds = control_kinds([prompts[row] for row in rows], [group[0] for group in cuts.values()])
    n_windows = len(flat) // len(cuts)
    value = np.full((len(readers), 2, len(flat), len(prompts)), np.nan)
    clean, n_edges = np.full((len(readers), len(prompts)), np.nan), np.zeros((len(cuts), len(prompts)), int)
    width = max(len(prompts[row]) for row in rows)
    size = min(rows_fitting(vlm, width, batch_size) for vlm, _ in readers.values())
    order = [row for step in steps_of(rows, prompts, size) for row in step]
    total = 2 * len(readers) * len(flat) * -(-len(order) // size)
    with tqdm(total=total, desc="routes", unit="cut", disable=not progress, delay=1) as bar:
        for m, (vlm, change) in enumerate(readers.values()):

            def measure(some: Sequence[int], vlm: HookedVLM = vlm) -> OfRows:
                batch = collate([prompts[row] for row in some]).to(vlm.device)
                lanes, beside = lanes_of(vlm, batch, flat, n_windows, kinds, [(seed, row) for row in some])
                edges = [lane.parts[0].edges.flatten(1).sum(1).cpu().numpy() for lane in lanes[::n_windows]]
                under = np.full((2, len(flat), len(some)), np.nan)
                with torch.no_grad():
                    part = CutBatch(vlm, batch, wanted.select(some))
                    for number, found in part.run([*lanes, *beside]):
                        under[number // len(flat), number % len(flat)] = found
                        bar.update()
                return part.clean, under, np.stack(edges)

            with nullcontext() if change is None else changed_weights(vlm.model, change):
                for some, found in in_shared_parts("routes", order, size, measure):
                    clean[m, some], value[m][..., some], n_edges[:, some] = found
    examples = [prompt.example for prompt in prompts]
    return _dataset(
        value, clean, n_edges, why, cuts, kinds, list(readers), examples, wanted, pair.in_.n_layers
    )


def steps_of(rows: Sequence[int], prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Rows by batch, prompts of like length together."""
    order = sorted(rows, key=lambda row: len(prompts[row]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def lanes_of(
    vlm: HookedVLM,
    batch: PromptBatch,
    flat: Sequence[Knockout],
    n_windows: int,
    kinds: Sequence[str],
    seeds: Sequence[tuple[int, int]],
) -> tuple[list[Lane], list[Lane]]:
    """The cuts of a batch, route by route, and their controls; arguments as of `random_edges.controls`."""
    lanes = cut_lanes(vlm, batch, flat)
    return lanes, controls(lanes, n_windows, kinds, batch.mask("all"), seeds)


def _flat(pair: Pair, prompts: Sequence[Prompt], cuts: Mapping[str, Sequence[Knockout]]) -> list[Knockout]:
    flat = [cut for group in cuts.values() for cut in group]
    if not prompts or not flat:
        raise FrankenlensError("routes needs at least one prompt and one route")
    windows = {name: [layers_label(cut) for cut in group] for name, group in cuts.items()}
    for name, labels in windows.items():
        if labels != next(iter(windows.values())):
            raise FrankenlensError(f"route {name!r} is cut in other windows than the first one: {labels}")
    for name, group in cuts.items():
        if any(
            cut.tower != "text" or cut.mass != group[0].mass or cut.edges != group[0].edges for cut in group
        ):
            raise FrankenlensError(f"route {name!r}: its cuts must differ in their layers alone, in the text")
    require_cuts(pair.in_, flat)
    return flat


def _why(prompts: Sequence[Prompt], cuts: Sequence[Knockout], metric: Metric) -> list[str]:
    """Per prompt, why it does not count; "" where it does."""
    found = []
    for row, prompt in enumerate(prompts):
        batch = collate([prompt])
        reasons = [reason for cut in cuts if (reason := missing(cut, batch)[0])]
        if not reasons and not bool(metric.select([row]).reads(batch).any()):
            reasons = [f"the metric {metric.name!r} reads no token"]
        found.append(reasons[0] if reasons else "")
    return found


def _dataset(
    value: Float[np.ndarray, "model kind cut example"],
    clean: Float[np.ndarray, "model example"],
    n_edges: Int[np.ndarray, "route example"],
    why: Sequence[str],
    cuts: Mapping[str, Sequence[Knockout]],
    kinds: Sequence[str],
    models: Sequence[str],
    examples: Sequence[Example],
    metric: Metric,
    n_layers: int,
) -> xr.Dataset:
    windows = next(iter(cuts.values()))
    shaped = value.reshape(len(models), 2, len(cuts), len(windows), len(examples))
    layers = [sorted(cut.layers_in(n_layers)) for cut in windows]
    dims = ("model", "route", "window", "example")
    return xr.Dataset(
        {
            "value": (dims, shaped[:, 0]),
            "control": (dims, shaped[:, 1]),
            "clean": (("model", "example"), clean),
            "n_edges": (("route", "example"), n_edges),
            "why": ("example", np.array(why, dtype=str)),
        },
        coords={
            "model": list(models),
            "route": list(cuts),
            "control_kind": ("route", list(kinds)),
            "source": ("route", [group[0].edges.split(" -> ")[0] for group in cuts.values()]),
            "target": ("route", [group[0].edges.split(" -> ")[1] for group in cuts.values()]),
            "window": [layers_label(cut) for cut in windows],
            "first": ("window", [of[0] for of in layers]),
            "last": ("window", [of[-1] for of in layers]),
            "example": [example.id for example in examples],
            "task": ("example", [example.task for example in examples]),
            "cluster": ("example", [cluster_of(example) for example in examples]),
        },
        attrs={"metric": metric.name, "units": metric.units, "mass": windows[0].mass},
    )
