"""All interventions on one batch: planned by reach, run in lanes that fit a memory budget, read by metrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import HookedVLM
from hooks.batches import MemoryRanOut, at_once, in_parts, item_bytes, lanes_fitting
from hooks.memory import limit
from hooks.weights import d_mlp
from interp.metrics.logits import Logits
from interp.metrics.reading import Reading
from interp.prompts import PromptBatch
from interp.sweep.attention import segments_on
from interp.sweep.brigade import run_lanes
from interp.sweep.edits import Edit, Span, needed_names
from interp.sweep.halves import Halves
from interp.sweep.places import of_vision
from interp.sweep.rerun import CleanRun
from interp.sweep.stored import StoredRun, Unsupported

LANE_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens (lanes x rows x columns) that one pass moves up the layers together, memory permitting: enough to fill the
device, and on a CPU few enough to stay in its cache."""


class BatchSweep:
    """One model on one batch, and every intervention asked for.

    Attributes:
        clean: the metrics of the clean run [metric batch].
        shortcuts: what the model allowed: "tokens and layers", "layers" or "none".
    """

    def __init__(
        self,
        vlm: HookedVLM,
        batch: PromptBatch,
        reading: Reading,
        interventions: Sequence[Sequence[Edit]],
        names: Sequence[str] = (),
        max_memory: int | None = None,
        check: bool = True,
        stored: dict[tuple[str, ...], StoredRun] | None = None,
    ) -> None:
        """Runs the batch clean and keeps what the interventions start from.

        Args:
            vlm: the opened model.
            batch: prompts on its device.
            reading: metrics of it.
            interventions: each a set of edits; one edit alone takes the short way, several together a longer one.
            names: further activations of the clean run to keep, for `activation`.
            max_memory: bytes for what is stored and for what runs at once.
            check: compare the shortcuts with the clean run first.
            stored: where clean runs of this model on this batch are kept, by what they keep: one is taken from there,
                and put there where it is not.

        Raises:
            FrankenlensError: nothing is read, or the budget is too small for one row.
        """
        self.vlm, self.batch, self._reading = vlm, batch, reading
        self.interventions = interventions
        self._max_memory, self._names = max_memory, names
        self._whole: CleanRun | None = None
        self._halves: dict[int, Halves] = {}
        self._require_budget()
        fast = [edits[0] for edits in interventions if self._is_fast(edits)]
        self._run: StoredRun | None = None
        if fast:
            try:
                self._run = self._stored([*names, *needed_names(fast, vlm)], check, stored)
            except Unsupported as reason:
                self._run = None
                warnings.warn(
                    f"{type(vlm.model).__name__} cannot be taken up at a stored token: {reason}. "
                    "Every intervention reruns all tokens from its layer on.",
                    stacklevel=3,
                )
        self.shortcuts = "tokens and layers" if self._run is not None else "layers"
        self.clean = reading((self._clean_run() if self._run is None else self._run).logits)

    def _stored(
        self, names: Sequence[str], check: bool, kept: dict[tuple[str, ...], StoredRun] | None
    ) -> StoredRun:
        """The clean run, taken from where it is kept or made now."""
        key = tuple(sorted(names))
        if kept is not None and key in kept:
            return kept[key]
        run = StoredRun(self.vlm, self.batch, self._reading.reads, names, self._storage())
        if check:
            run.check()
        if kept is not None:
            kept[key] = run
        return run

    def activation(self, name: str) -> Float[Tensor, "..."]:
        """An activation of the clean run that was asked for by name."""
        return self._run.read(name) if self._run is not None else self._clean_run().cache[name]

    def order(self) -> list[int]:
        """Numbers of the interventions in the order they are best run: by first token, then by layer."""
        return sorted(range(len(self.interventions)), key=lambda n: (*self._key(n), n))

    def run(self, numbers: Sequence[int]) -> Iterator[tuple[int, Float[Tensor, "metric batch"]]]:
        """The metrics under each of these interventions, in the order they become known.

        Between two of them nothing is held: not the model, no mode of PyTorch.
        """
        unchanged, longer, groups = self.grouped(numbers)
        for number in unchanged:
            yield number, self.clean
        for number in longer:
            whole = self._clean_run()
            logits = whole.rerun([edit.hook() for edit in self.interventions[number]])
            # unembedding fewer tokens may round differently: what changes nothing is the clean run
            yield number, self.clean if logits.equal(whole.logits) else self._reading(logits)
        for span, lanes in groups:
            size = self._lanes_at_once(span)
            if self._max_memory is None:  # a plan does not ask what is free here and now
                size = lanes_fitting(self.vlm, size, self.lane_bytes(span), self._held)
            for _, found in in_parts(lanes, size, partial(self._of_lanes, span)):
                yield from found

    @torch.no_grad()
    def _of_lanes(
        self, span: Span, lanes: Sequence[tuple[int, Edit]]
    ) -> list[tuple[int, Float[Tensor, "metric batch"]]]:
        """The metrics under interventions that all begin in the first column of a span, at once."""
        assert self._run is not None
        with segments_on(self.vlm, self._run.attentions):
            return [
                (number, self.clean if logits is None else self._of_reached(number, logits))
                for number, logits in run_lanes(self._run, lanes, span)
            ]

    def grouped(
        self, numbers: Sequence[int]
    ) -> tuple[list[int], list[int], list[tuple[Span, list[tuple[int, Edit]]]]]:
        """Interventions that nothing is run for, those that rerun whole layers, and lanes by the tokens they run on."""
        unchanged, longer = [], []
        groups: dict[int, list[tuple[int, Edit]]] = {}
        for number in numbers:
            edits, first = self.interventions[number], self._first_column(number)
            if first is None:
                unchanged.append(number)
            elif self._run is None or not self._is_fast(edits) or self._is_apart(edits[0]):
                longer.append(number)
            elif first >= self._run.end:
                unchanged.append(number)  # after all that is read
            else:
                groups.setdefault(first, []).append((number, edits[0]))
        end = 0 if self._run is None else self._run.end
        lanes = [(Span(first, end), sorted(group, key=_start)) for first, group in sorted(groups.items())]
        return unchanged, longer, lanes

    def _of_reached(self, number: int, logits: Logits) -> Float[Tensor, "metric batch"]:
        """The metrics; exactly the clean ones in rows where all that is touched comes after all that is read."""
        (edit,) = self.interventions[number]
        found = self._reading(logits)
        if edit.where is None:
            return found
        reached = (edit.where.to(self._to_come.device) & self._to_come).any(1)
        return torch.where(reached.to(found.device), found, self.clean)

    @cached_property
    def _to_come(self) -> Bool[Tensor, "batch pos"]:
        """The tokens from which on something is read."""
        return self._reading.reads.flip(1).cumsum(1).flip(1).bool()

    def _is_fast(self, edits: Sequence[Edit]) -> bool:
        """Whether these are one edit, at a place where the clean run can be taken up."""
        if len(edits) != 1 or edits[0].stage is None:
            return False
        point = edits[0].point
        if point.layer is None:
            return True
        if point.layer not in self._halves:
            self._halves[point.layer] = Halves(self.vlm, point.layer)
        if edits[0].stage == "inside":
            return not point.relaid
        return self._halves[point.layer].starts(point.leaf)

    def _is_apart(self, edit: Edit) -> bool:
        """An edit of a projector whose rows are not those that the decoder reads (newlines stand among them)."""
        return edit.point.leaf == "hook_out" and self._run is not None and not self._run.image_rows

    def _first_column(self, number: int) -> int | None:
        firsts = []
        for edit in self.interventions[number]:
            if edit.point.leaf == "hook_out" and self._run is not None:
                columns = self._run.image_mask.any(0).nonzero()
                across = 0 if bool(self.batch.with_image.any()) and not self._run.image_rows else None
                firsts.append(int(columns[0]) if len(columns) and across is None else across)
            else:
                firsts.append(edit.first_column())
        known = [first for first in firsts if first is not None]
        return min(known) if known else None

    def _key(self, number: int) -> tuple[int, int, int]:
        first = self._first_column(number)
        return (-1 if first is None else first, *self.interventions[number][0].start)

    def _clean_run(self) -> CleanRun:
        if self._whole is None:
            self._whole = CleanRun(self.vlm, self.batch.inputs, self._names, self._reading.columns)
        return self._whole

    def _lanes_at_once(self, span: Span) -> int:
        rows = len(self.batch)
        lanes = max(1, LANE_TOKENS.get(self.vlm.device.type, 8192) // (rows * len(span)))
        if self._max_memory is None:
            if limit() is None:
                return lanes
            return lanes_fitting(self.vlm, lanes, self.lane_bytes(span), self._held)
        free = self._max_memory - self._held
        fits = max(1, int(free // self.lane_bytes(span)))
        return min(lanes, fits)

    @property
    def _held(self) -> int:
        """What is taken beside the lanes."""
        return self.stored_bytes + self.logits_bytes

    @property
    def stored_bytes(self) -> int:
        """What the clean run keeps on the model's device."""
        return 0 if self._storage() is not None else self._storage_estimate()

    def _storage_estimate(self) -> int:
        """Streams, keys and values (kept as they are read and as they are used), and what single edits start from."""
        rows, width = self.batch.roles.shape
        edits = [edit for edits in self.interventions for edit in edits]
        names = {*self._names, *needed_names(edits, self.vlm)}
        further = sum(self._floats(name) for name in names if not of_vision(name))
        return rows * (stored_bytes(self.vlm, width) + width * further * self._item)

    def _floats(self, name: str) -> int:
        """Per token."""
        leaf = name.rpartition(".")[2]
        if leaf == "hook_post":
            return self._d_mlp
        inside = leaf in ("hook_z", "hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k")
        return self._width if inside else self.vlm.d_model

    @property
    def _width(self) -> int:
        """All heads of one block, where they are widest."""
        return max(block.n_heads * block.d_head for block in self.vlm.anatomy.text.blocks)

    @property
    def _d_mlp(self) -> int:
        widths = [
            d_mlp(self.vlm.model, block)
            for block in self.vlm.anatomy.text.blocks
            if (writer := block.writer("mlp")) is not None and writer.last is not None
        ]
        return max(widths, default=4 * self.vlm.d_model)

    def _storage(self) -> torch.device | None:
        """Main memory if what is kept would take more than half of the budget."""
        too_big = self._max_memory is not None and self._storage_estimate() > self._max_memory // 2
        return torch.device("cpu") if too_big and self.vlm.device.type != "cpu" else None

    @property
    def _item(self) -> int:
        return next(self.vlm.model.parameters()).element_size()

    def lane_bytes(self, span: Span) -> int:
        """An upper estimate of what one lane takes at its widest: stream, attention and MLP of one block."""
        rows, n = len(self.batch), len(span)
        stream = n * (8 * self.vlm.d_model + 4 * self._d_mlp + 6 * self._width)
        attention = 2 * self.vlm.n_heads * n * span.stop + 2 * self._width * span.stop
        return rows * (stream + attention) * self._item

    @property
    def logits_bytes(self) -> int:
        """What the logits that are read take together, three times (as made, in fp32, and times what they weigh)."""
        n_words = self.vlm.n_logits
        return 3 * 4 * n_words * min(int(self._reading.reads.sum()), at_once(n_words, self.vlm.device))

    def _require_budget(self) -> None:
        """Refuses a budget that not even one lane fits in."""
        if self._max_memory is None:
            return
        least = self.stored_bytes + self.lane_bytes(Span(0, self.batch.roles.shape[1])) + self.logits_bytes
        if least > self._max_memory:
            raise MemoryRanOut(
                f"max_memory of {self._max_memory / 2**20:.0f} MiB is too small for one intervention on "
                f"{len(self.batch)} prompts of {self.batch.roles.shape[1]} tokens, which takes about "
                f"{least / 2**20:.0f} MiB; give more, or a smaller batch_size"
            )


def stored_bytes(vlm: HookedVLM, width: int) -> int:
    """What a row of so many tokens leaves to be taken up at: streams, keys and values, as read and as they are used."""
    blocks = vlm.anatomy.text.blocks
    a_layer = 2 * vlm.d_model + 4 * max((block.n_kv_heads * block.d_head for block in blocks), default=0)
    return width * a_layer * len(blocks) * item_bytes(vlm)


def _start(lane: tuple[int, Edit]) -> tuple[int, int]:
    return lane[1].start
