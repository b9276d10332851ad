"""Many cuts of many layers on one batch, each continued from where it begins and all moved up the layers together.

A lane is a copy of the batch under one cut, as in `interp.sweep.brigade`: it joins at the first layer that is cut, at
the first token whose attention changes. Lanes whose cut is a mask keep SDPA; single heads and lost mass need the
scores, and only in the layers that are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from hooks.engine import HookFunction
from interp.knockout.cut import Knockout
from interp.metrics.logits import Logits
from interp.sweep.attention import segments_on
from interp.sweep.edits import Span
from interp.sweep.stored import StoredRun


@dataclass(frozen=True, eq=False)
class Lane:
    """A cut on one batch: which edges, in which layers.

    Attributes:
        number: of the cut.
        parts: each knockout's edges [batch query key], layers, heads (None: all) and whether their mass is lost.
    """

    number: int
    parts: tuple[Part, ...]

    @property
    def start(self) -> int:
        """The first layer that is cut."""
        return min(min(part.layers) for part in self.parts)

    @property
    def first_column(self) -> int:
        """The first column whose attention changes in some row."""
        return min(int(part.edges.any(2).any(0).nonzero()[0]) for part in self.parts)

    def here(self, layer: int) -> list[Part]:
        """What is cut in a layer."""
        return [part for part in self.parts if layer in part.layers]

    def hooks(self) -> list[tuple[str, HookFunction]]:
        """The same as forward hooks of a whole pass over the batch."""
        span = Span(0, self.parts[0].edges.shape[1])
        found: list[tuple[str, HookFunction]] = []
        for layer in sorted({layer for part in self.parts for layer in part.layers}):
            tap = _tap([self.here(layer)], span)
            leaves = {"hook_pattern" if part.lost else "hook_attn_scores" for part in self.here(layer)}
            for leaf in sorted(leaves):
                name = f"blocks.{layer}.attn.{leaf}"
                found.append((name, lambda square, hook, tap=tap: tap(hook.point.leaf, square)))
        return found


@dataclass(frozen=True, eq=False)
class Part:
    """Edges that are cut in some layers; see `Lane`."""

    edges: Bool[Tensor, "batch query key"]
    layers: frozenset[int]
    heads: tuple[int, ...] | None = None
    lost: bool = False

    @classmethod
    def of(cls, cut: Knockout, edges: Bool[Tensor, "batch query key"], layers: frozenset[int]) -> Part:
        """A knockout of the text, given its edges and the layers that it reaches."""
        return cls(edges, layers, cut.heads, cut.mass == "lost")

    @property
    def is_mask(self) -> bool:
        """Whether it needs no scores."""
        return self.heads is None and not self.lost


def run_cuts(run: StoredRun, lanes: Sequence[Lane], span: Span) -> Iterator[tuple[int, Logits]]:
    """The logits at the run's columns under every lane.

    Args:
        run: the clean run.
        lanes: at least one; none acts before the first column of `span`.
        span: from the first column that any of them touches to the last one that is read.
    """
    waiting = sorted(lanes, key=lambda lane: lane.start)
    riding: list[Lane] = []
    rows = len(run.batch)
    stream = run.pre(waiting[0].start, span)[:0]
    with torch.no_grad(), segments_on(run.vlm, run.attentions):
        for layer in range(waiting[0].start, len(run.blocks)):
            while waiting and waiting[0].start == layer:
                riding.append(waiting.pop(0))
                stream = torch.cat([stream, run.pre(layer, span)])
            stream = _block(run, layer, riding, stream, span)
            if layer in run.added:
                stream = stream + run.added[layer][:, span.columns].to(stream).repeat(len(riding), 1, 1)
    columns, norm = run.reads_within(span), run.vlm.module(run.vlm.anatomy.final_norm)
    for place, lane in enumerate(riding):
        with torch.no_grad():
            normed = norm(stream[place * rows : (place + 1) * rows, columns])
        yield lane.number, run.logits_of(normed, span)


def _block(run: StoredRun, layer: int, lanes: Sequence[Lane], stream: Tensor, span: Span) -> Tensor:
    """One block on all lanes: those not cut here, those cut by a mask, and those that need scores, each at once."""
    rows, device = len(run.batch), stream.device
    kinds: dict[str, list[int]] = {"clear": [], "mask": [], "scores": []}
    for place, lane in enumerate(lanes):
        here = lane.here(layer)
        kinds["clear" if not here else "mask" if all(part.is_mask for part in here) else "scores"].append(
            place
        )
    out = torch.empty_like(stream)
    for kind, places in kinds.items():
        if not places:
            continue
        index = (torch.tensor(places)[:, None] * rows + torch.arange(rows)).flatten().to(device)
        some, given = stream[index], [lanes[place].here(layer) for place in places]
        if kind == "clear":
            new = run.run_block(layer, some, span)
        elif kind == "mask":
            edges = [torch.stack([_of_span(part, span) for part in parts]).any(0) for parts in given]
            new = run.run_block(layer, some, span, cut=torch.cat(edges).to(device))
        else:
            new = run.run_block(layer, some, span, _tap(given, span), dense=True)
        out[index] = new
    return out


def _of_span(part: Part, span: Span) -> Bool[Tensor, "batch query key"]:
    return part.edges[:, span.columns, : span.stop]


def _tap(given: Sequence[Sequence[Part]], span: Span) -> Callable[[str, Tensor], Tensor]:
    """Renormalized parts hide scores, lost ones zero the pattern, lane by lane."""

    def tap(leaf: str, square: Tensor) -> Tensor:
        if leaf not in ("hook_attn_scores", "hook_pattern"):
            return square
        lost, value = leaf == "hook_pattern", 0.0 if leaf == "hook_pattern" else -torch.inf
        lanes = square.unflatten(0, (len(given), -1)).clone()
        for lane, parts in zip(lanes, given, strict=True):
            for part in parts:
                if part.lost == lost:
                    edges = _of_span(part, span).to(lane.device)[:, None]
                    heads = range(lane.shape[1]) if part.heads is None else part.heads
                    lane[:, list(heads)] = lane[:, list(heads)].masked_fill(edges, value)
        return lanes.flatten(0, 1)

    return tap
