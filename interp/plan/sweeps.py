"""What a sweep of one batch computes, by the reach and the lanes that the engine itself plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from interp.plan.arithmetic import Arithmetic
from interp.plan.images import Pictures
from interp.sweep.brigade import own_part
from interp.sweep.edits import Edit, Span, needed_names
from interp.sweep.halves import Halves
from interp.sweep.planned import PlannedSweep
from interp.sweep.rerun import before_the_decoder

Kind = tuple[int, str, int]
"""Of lanes that cost the same: layer, what of that block they run (`own_part`), first column."""


class SweepCost:
    """FLOPs of one planned sweep.

    Args:
        arithmetic: of its model.
        planned: the sweep.
        pictures: the images of its batch.
    """

    def __init__(self, arithmetic: Arithmetic, planned: PlannedSweep, pictures: Pictures) -> None:
        self._arithmetic, self._planned, self._pictures = arithmetic, planned, pictures
        self._vlm, self._rows = arithmetic.vlm, len(planned.batch)
        self._width = planned.batch.roles.shape[1]
        self._columns = planned.reads.any(0).nonzero()[:, 0].tolist()
        self._halves = [Halves(self._vlm, layer) for layer in range(self._vlm.n_layers)]

    def all(self, still: Collection[int] = ()) -> int:
        """Everything: the clean run, its check, and every intervention.

        Args:
            still: numbers of interventions whose value is what was there: they are begun, and not run.
        """
        planned = self._planned
        _, longer, groups = planned.grouped(range(len(planned.interventions)))
        again = any(not _is_early(planned.interventions[number]) for number in longer)
        total = self.clean(bool(longer), again)
        kinds: Counter[Kind] = Counter()
        for span, lanes in groups:
            for number, edit in lanes:
                if number not in still:
                    kinds[self._kind(edit, span)] += 1
        total += sum(n * self._lane(*kind) for kind, n in kinds.items())
        return total + sum(self._longer(planned.interventions[number]) for number in longer)

    def clean(self, longer: bool, again: bool) -> int:
        """The runs that interventions start from, and the proof that they can.

        Args:
            longer: whether some rerun all tokens.
            again: whether some of these begin at a layer.
        """
        total, planned = 0, self._planned
        if planned.tried:
            total += self._whole(self._rows)
        if planned.shortcuts == "tokens and layers":
            total += self._check() + self._read()
        if longer:
            total += self._whole(self._rows)
        if again:  # that a rerun can begin at a layer is tried once
            total += self._rows * self._arithmetic.decoder(self._width, self._width)
        return total + self._read()

    def lane(self, first_layer: int, first: int, whole: bool) -> int:
        """One copy of the batch from a layer and a column on.

        Args:
            first_layer, first: where it joins.
            whole: whether the last block runs on all of its tokens, not on those alone that are read.
        """
        last, end = self._vlm.n_layers - 1, self._planned.end
        total = sum(self._block(layer, first) for layer in range(first_layer, last))
        total += self._arithmetic.block(last, end - first, end) if whole else self._block(last, first)
        return self._rows * total + self._read()

    def longer(self, first_layer: int) -> int:
        """A rerun of all tokens from a layer on."""
        blocks = range(first_layer, self._vlm.n_layers)
        total = sum(self._arithmetic.block(layer, self._width, self._width) for layer in blocks)
        return self._rows * total + self._read()

    def _whole(self, read: int) -> int:
        return self._arithmetic.forward(self._rows, self._width, self._pictures, read)

    def _read(self) -> int:
        return self._planned.n_read * self._arithmetic.unembedding

    def _kind(self, edit: Edit, span: Span) -> Kind:
        layer = min(edit.start[0], self._vlm.n_layers)
        in_turn = layer < self._vlm.n_layers and self._halves[layer].in_turn
        return layer, own_part(edit, in_turn), span.start

    def _lane(self, layer: int, part: str, first: int) -> int:
        """One copy of the batch under one edit, from where it joins to the logits."""
        own, last = 0, self._vlm.n_layers - 1
        begin = layer if part == "block" else layer + 1
        tokens = self._planned.end - first
        if part == "inside":
            own = self._arithmetic.block(layer, tokens, self._planned.end)
        elif part == "second":
            own = self._arithmetic.second(layer) * (self._within(first) if layer == last else tokens)
        blocks = sum(self._block(one, first) for one in range(begin, last + 1))
        return self._rows * (own + blocks) + self._read()

    def _block(self, layer: int, first: int) -> int:
        """One row: of the last block only what is read is computed, where it is a plain one."""
        some = layer == self._vlm.n_layers - 1 and self._halves[layer].block.plain
        end = self._planned.end
        return self._arithmetic.block(layer, end - first, end, self._within(first) if some else None)

    def _within(self, first: int) -> int:
        """Columns that are read, from a first one on."""
        return sum(column >= first for column in self._columns)

    def _longer(self, edits: Iterable[Edit]) -> int:
        """A rerun of all tokens: from a layer on, or the whole model where something acts before the decoder."""
        if _is_early(edits):
            return self._whole(self._rows) + self._read()
        return self.longer(min(edit.point.layer or 0 for edit in edits))

    def _check(self) -> int:
        """`StoredRun.check`: every block from the first token, from the middle, and at the last."""
        end, total = self._planned.end, 0
        edits = [edit for edits in self._planned.interventions for edit in edits]
        kept = set(needed_names(edits, self._vlm))
        for first in {0, end // 2, end - 1}:
            for layer, half in enumerate(self._halves):
                total += self._rows * self._ways(layer, half, first, kept)
        return total + self._rows * self._arithmetic.unembedding

    def _ways(self, layer: int, half: Halves, first: int, kept: set[str]) -> int:
        """The ways in which `StoredRun.check` takes up a block at a token, one row."""
        tokens, end = self._planned.end - first, self._planned.end
        total = self._block(layer, first)
        if half.in_turn:
            total += self._arithmetic.second(layer) * tokens
        name, block = f"blocks.{layer}", half.block
        if f"{name}.attn.hook_z" in kept and half.first is not None and half.starts("hook_z"):
            total += self._arithmetic.row(block.out) * tokens
        if f"{name}.mlp.hook_post" in kept and half.second is not None and half.starts("hook_post"):
            total += self._arithmetic.row(block.mlp_out) * tokens
        if first == end // 2 and block.site is not None:
            total += 2 * self._arithmetic.block(layer, tokens, end) + 2 * self._block(layer, first)
        return total


def _is_early(edits: Iterable[Edit]) -> bool:
    """Whether an intervention acts on something that is computed before the first decoder block."""
    points = [edit.point for edit in edits]
    return any(before_the_decoder(point.name) or point.layer is None for point in points)
