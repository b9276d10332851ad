"""What cuts do to a metric: every cut on every prompt, many at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.batches import (
    fitting,
    forward_bytes,
    in_parts,
    in_shared_parts,
    lanes_fitting,
    logits_bytes,
    scores_bytes,
)
from interp.knockout.attached import knocked_out, missing
from interp.knockout.cut import Cut, cut_layers, cut_name, layers_label, require_cuts, together
from interp.knockout.lanes import Lane, Part, run_cuts
from interp.knockout.places import Unfolding
from interp.metrics.logits import Logits, run_for_logits
from interp.metrics.reading import Metric, Reading
from interp.prompts import Prompt, PromptBatch, collate
from interp.sweep.batch import LANE_TOKENS, stored_bytes
from interp.sweep.edits import Span
from interp.sweep.rerun import CleanRun
from interp.sweep.stored import StoredRun, Unsupported

OfRows = tuple[Float[np.ndarray, " row"], Float[np.ndarray, "*cut row"], Int[np.ndarray, "cut row"]]
"""Of some prompts: the metric of the clean run and under every cut, and the edges cut."""


@torch.no_grad()
def knockout_effects(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    cuts: Sequence[Cut],
    metric: Metric,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """A metric under every cut, on every prompt.

    A cut is computed from the first layer and the first token on that it can change, many cuts at once. Where a model
    does not allow that, and for cuts in the vision tower, each is a full forward; the numbers are the same.

    Args:
        vlm: the opened model.
        prompts: what it reads.
        cuts: knockouts, or tuples of knockouts that are made together.
        metric: what is measured.
        batch_size: prompts that run together.
        progress: show a bar.

    Returns:
        value [cut example] and clean [example], in the metric's units; n_edges [cut example], the edges cut in one
        layer and head; coordinates source, target, layers, heads, mass, tower of every cut.

    Raises:
        FrankenlensError: no prompts, a layer or head that the model does not have, a prompt in which a cut cuts
            nothing, or of which the metric reads nothing; before anything runs.
    """
    require_cuts(vlm, cuts)
    if not prompts:
        raise FrankenlensError("knockout_effects needs at least one prompt")
    _require_rows(prompts, cuts, metric)
    value = np.full((len(cuts), len(prompts)), np.nan)
    clean, n_edges = np.full(len(prompts), np.nan), np.zeros(value.shape, dtype=int)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    size = rows_fitting(vlm, max(map(len, prompts)), batch_size)
    total = -(-len(order) // size) * len(cuts)
    with tqdm(total=total, desc="knockout", unit="cut", disable=not progress, delay=1) as bar:

        def measure(rows: Sequence[int]) -> OfRows:
            batch = collate([prompts[row] for row in rows]).to(vlm.device)
            lanes = cut_lanes(vlm, batch, cuts)
            part = CutBatch(vlm, batch, metric.select(rows))
            under, edges = (
                np.full((len(cuts), len(rows)), np.nan),
                np.zeros((len(cuts), len(rows)), dtype=int),
            )
            for lane in lanes:
                edges[lane.number] = sum(p.edges.flatten(1).sum(1).cpu().numpy() for p in lane.parts)
            for cut, found in part.run(lanes):
                under[cut] = found
                bar.update()
            for cut in sorted(set(range(len(cuts))) - {lane.number for lane in lanes}):
                under[cut] = part.run_whole(cuts[cut])
                bar.update()
            return part.clean, under, edges

        for rows, found in in_shared_parts("knockout", order, size, measure):
            clean[rows], value[:, rows], n_edges[:, rows] = found
    return xr.Dataset(
        {
            "value": (("cut", "example"), value),
            "clean": ("example", clean),
            "n_edges": (("cut", "example"), n_edges),
        },
        coords=_coords(cuts) | {"example": [prompt.example.id for prompt in prompts]},
        attrs={"metric": metric.name, "units": metric.units},
    )


def rows_fitting(vlm: HookedVLM, width: int, batch_size: int) -> int:
    """Prompts that run together, each clean and under one cut at least.

    Raises:
        FrankenlensError: there is no memory for one prompt.
    """
    of_row = stored_bytes(vlm, width) + 2 * forward_bytes(vlm, width) + scores_bytes(vlm, width)
    return fitting(vlm, batch_size, of_row, "a knockout", logits_bytes(vlm, width))


def cut_lanes(vlm: HookedVLM, batch: PromptBatch, cuts: Sequence[Cut]) -> list[Lane]:
    """The cuts of the text as lanes over a batch; those in the vision tower are left out."""
    wanted = [(n, together(cut)) for n, cut in enumerate(cuts)]
    wanted = [(n, parts) for n, parts in wanted if all(part.tower == "text" for part in parts)]
    unfolding = Unfolding(
        batch, [p for _, parts in wanted for one in parts for p in (one.source, one.target)]
    )
    made: dict[tuple, Tensor] = {}
    lanes = []
    for number, parts in wanted:
        for one in parts:
            made.setdefault((one.source, one.target), unfolding.edges(one.source, one.target))
        of = [Part.of(one, made[one.source, one.target], cut_layers(vlm, one)) for one in parts]
        lanes.append(Lane(number, tuple(of)))
    return lanes


class CutBatch:
    """One batch of prompts: run clean, and under any lanes.

    Attributes:
        clean: the metric of the clean run.
    """

    def __init__(self, vlm: HookedVLM, batch: PromptBatch, metric: Metric) -> None:
        """Runs the batch clean.

        Args:
            vlm: the opened model.
            batch: prompts on its device.
            metric: of these prompts.
        """
        self.vlm, self.batch, self._reading = vlm, batch, Reading([metric], batch)
        self._run: StoredRun | None = None
        try:
            self._run = StoredRun(vlm, batch, self._reading.reads)
            self._run.check()
        except Unsupported as reason:
            self._run = None
            warnings.warn(
                f"{type(vlm.model).__name__} cannot be taken up at a stored token: {reason}. "
                "Every cut reruns all tokens from its layer on.",
                stacklevel=3,
            )
        logits = self._whole() if self._run is None else self._run.logits
        self.clean = self._measure(logits)

    def run(self, lanes: Sequence[Lane]) -> Iterator[tuple[int, Float[np.ndarray, " batch"]]]:
        """The metric under every lane of this batch, by the lane's number."""
        run = self._run
        if run is None:
            clean = CleanRun(self.vlm, self.batch.inputs, columns=self._reading.columns)
            yield from ((lane.number, self._measure(clean.rerun(lane.hooks()))) for lane in lanes)
            return
        unreached, groups = grouped(lanes, run.end, len(self.batch), self.vlm.device.type)
        yield from ((lane.number, self.clean) for lane in unreached)
        for span, group in groups:

            def measure(some: Sequence[Lane], span: Span = span) -> list[tuple[int, np.ndarray]]:
                return [(number, self._measure(logits)) for number, logits in run_cuts(run, some, span)]

            for _, found in in_parts(group, self._lanes_at_once(group, span), measure):
                yield from found

    def _lanes_at_once(self, lanes: Sequence[Lane], span: Span) -> int:
        rows, width = len(self.batch), self.batch.roles.shape[1]
        of_row = forward_bytes(self.vlm, span.stop)
        if any(not part.is_mask for lane in lanes for part in lane.parts):
            of_row += scores_bytes(self.vlm, span.stop)
        held = rows * stored_bytes(self.vlm, width) + logits_bytes(self.vlm, rows * width)
        return lanes_fitting(self.vlm, len(lanes), rows * of_row, held)

    def run_whole(self, cut: Cut) -> Float[np.ndarray, " batch"]:
        """The metric under a cut that is no lane."""
        with knocked_out(self.vlm, cut, self.batch):
            return self._measure(self._whole())

    @torch.no_grad()
    def _whole(self) -> Logits:
        return run_for_logits(self.vlm, self.batch.inputs, self._reading.columns)

    @torch.no_grad()
    def _measure(self, logits: Logits) -> Float[np.ndarray, " batch"]:
        return self._reading(logits)[0].double().cpu().numpy()


def grouped(
    lanes: Sequence[Lane], end: int, rows: int, device: str
) -> tuple[list[Lane], list[tuple[Span, list[Lane]]]]:
    """Lanes that reach nothing that is read, and those that ride together with the tokens that they run on.

    Args:
        lanes: of one batch.
        end: one past the last column that is read.
        rows: of the batch.
        device: its type.
    """
    firsts: dict[int, list[Lane]] = {}
    for lane in lanes:
        firsts.setdefault(lane.first_column, []).append(lane)
    unreached: list[Lane] = []
    riding: list[tuple[Span, list[Lane]]] = []
    for first, group in sorted(firsts.items()):
        if first >= end:
            unreached += group
            continue
        span = Span(first, end)
        size = max(1, LANE_TOKENS.get(device, 8192) // (rows * len(span)))
        group.sort(key=lambda lane: lane.start)
        riding += [(span, group[at : at + size]) for at in range(0, len(group), size)]
    return unreached, riding


def _require_rows(prompts: Sequence[Prompt], cuts: Sequence[Cut], metric: Metric) -> None:
    places = dict.fromkeys(tuple((p.source, p.target, p.tower) for p in together(cut)) for cut in cuts)
    one_of = {tuple((p.source, p.target, p.tower) for p in together(cut)): cut for cut in cuts}
    for row, prompt in enumerate(prompts):
        batch = collate([prompt])
        for place in places:
            (why,) = missing(one_of[place], batch)
            if why:
                raise FrankenlensError(f"row {row} ({prompt.example.id}): {why}")
        if not bool(metric.select([row]).reads(batch).any()):
            raise FrankenlensError(
                f"row {row} ({prompt.example.id}): the metric {metric.name!r} reads no token of it"
            )


def _coords(cuts: Sequence[Cut]) -> dict[str, tuple[str, list[str]] | list[str]]:
    def each(of) -> tuple[str, list[str]]:
        return "cut", [" & ".join(dict.fromkeys(of(one) for one in together(cut))) for cut in cuts]

    return {
        "cut": [cut_name(cut) for cut in cuts],
        "edges": each(lambda one: one.edges),
        "layers": each(layers_label),
        "heads": each(lambda one: "all" if one.heads is None else ",".join(map(str, one.heads))),
        "mass": each(lambda one: one.mass),
        "tower": each(lambda one: one.tower),
    }
