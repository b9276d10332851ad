"""What path patching computes and holds: its own edits in a planned sweep, their values, and paths in order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hooks.address import Address
from interp.map.component_map import batches_of
from interp.paths.job import changed_tokens, complete_senders, paths_between
from interp.paths.path import Between, Path, Receiver, sender_hook
from interp.paths.run import received_at
from interp.plan.images import Pictures, pictures_of
from interp.plan.memory import held_by_sweep
from interp.plan.runs import Reads, Runs
from interp.plan.sweeps import SweepCost
from interp.plan.work import Work, together
from interp.prompts import Prompt, PromptBatch, collate
from interp.prompts.pairing import beside, partners
from interp.sweep.edits import Edit
from interp.sweep.planned import PlannedSweep


class PathsPlan:
    """`interp.paths.pair.pair_paths` in one direction.

    Args:
        runs: of the models.
        reads: what the metric reads.
        senders: addresses.
        receivers, where, between: as there.
        at_tokens: whether the model can be taken up at a token.
    """

    def __init__(
        self,
        runs: Runs,
        reads: Reads,
        senders: Sequence[str],
        receivers: Sequence[str] | None,
        where: str,
        between: Between,
        at_tokens: bool = True,
    ) -> None:
        self._runs, self._vlm, self._arithmetic = runs, runs.vlm, runs.arithmetic
        self._reads, self._where, self._at_tokens = reads, where, at_tokens
        self._paths = paths_between(runs.vlm, senders, receivers, between)
        self._senders = list(dict.fromkeys(path.sender for path in self._paths))
        whole = complete_senders(runs.vlm, self._paths, self._senders, between)
        self._complete = [s for s, all_of_them in zip(self._senders, whole, strict=True) if all_of_them]
        self._complete = self._complete if between == "frozen" else []

    def work(self, prompts: Sequence[Prompt], what: str = "paths") -> Work:
        """Of all prompts."""
        partner, found = partners(prompts), []
        for rows in batches_of(prompts, self._runs.batch_size):
            others = beside(prompts, rows, partner)
            batch = collate([prompts[row] for row in rows])
            found.append(self._effects(batch, others, partner[rows]))
            if self._complete:
                found.append(self._in_order(batch))
        return together(what, found)

    def _effects(self, batch: PromptBatch, others: Sequence[Prompt], partner: Tensor) -> Work:
        vlm, reads, pictures = self._vlm, self._reads(batch), pictures_of(self._vlm, batch.prompts)
        where = changed_tokens(self._where, batch, reads)
        kinds = [where, *([where & (partner >= 0)[:, None]] if others else [])]
        edits = [[edit] for mask in kinds for edit in self._edits(mask)]
        planned = PlannedSweep(vlm, batch, reads, edits, at_tokens=self._at_tokens)
        rows, width = batch.roles.shape
        first = int(where.any(0).nonzero()[0])
        flops = SweepCost(self._arithmetic, planned, pictures).all()
        flops += self._clean(batch, pictures, planned.n_read) + self._check(rows, width, pictures)
        if others:
            own = pictures_of(vlm, others)
            flops += 2 * self._arithmetic.forward(rows, max(map(len, others)), own, rows)
        flops += len(kinds) * rows * self._made(width, first)
        names = [sender_hook(sender).replace("hook_result", "hook_z") for sender in self._senders]
        kept = self._runs.footprint.kept([*names, *self._needed()], rows, width, pictures)
        kept += (1 + 2 * bool(others)) * self._runs.footprint.kept(names, rows, width, pictures)
        held = {"streams and senders' values": kept, "changes and outputs": self._passing(rows, width)}
        held |= held_by_sweep(self._runs.footprint, planned, pictures)
        return Work("effects", len(edits) + 4 + 2 * bool(others), flops, held)

    def _edits(self, where: Tensor) -> list[Edit]:
        """As `PathRun.whole` and `PathRun.edit` make them."""
        points, n = self._vlm.hook_points, self._vlm.n_layers

        def same(activation: Tensor, span: object) -> Tensor:
            return activation

        found = [Edit(points[sender_hook(s)], same, where, s.index) for s in self._senders]
        for path in self._paths:
            layer, leaf = received_at(path.receiver, n)
            found.append(Edit(points[f"blocks.{layer}.{leaf}"], same, where, path.receiver.index))
        return found

    def _clean(self, batch: PromptBatch, pictures: Pictures, n_read: int) -> int:
        """Recipient and donor, whose metric is read."""
        rows, width = batch.roles.shape
        once = self._arithmetic.forward(rows, width, pictures, rows)
        return 2 * once + n_read * self._arithmetic.unembedding

    def _check(self, rows: int, width: int, pictures: Pictures) -> int:
        """Every receiver's output once more."""
        ends = {(path.receiver.layer, path.receiver.via): path.receiver for path in self._paths}
        outputs = sum(self._output(end) for end in ends.values())
        inside = [end for end in ends.values() if end.address is not None]
        return bool(inside) * (self._arithmetic.forward(rows, width, pictures, rows) + rows * width * outputs)

    def _made(self, width: int, first: int) -> int:
        """Of one row: what each sender writes, in both models, and each of its receivers' outputs, once a layer."""
        total = 0
        for sender in self._senders:
            ends = {received_at(p.receiver, self._vlm.n_layers): p.receiver for p in self._of(sender)}
            total += sum((width - first) * self._output(end) for end in ends.values())
            total += 2 * len(ends) * width * self._written(sender)
        return total

    def _in_order(self, batch: PromptBatch) -> Work:
        """Every complete sender: a rerun from its first receiver on, receivers' inputs with its change and without."""
        (rows, width), pictures = batch.roles.shape, pictures_of(self._vlm, batch.prompts)
        n_read = int(self._reads(batch).sum())
        flops = self._clean(batch, pictures, n_read) + n_read * self._arithmetic.unembedding
        flops += rows * self._arithmetic.decoder(width, width)  # that a rerun can begin at a layer is tried
        for sender in self._complete:
            layers = sorted({p.receiver.layer for p in self._of(sender) if p.receiver.layer is not None})
            first = min(layers, default=self._vlm.n_layers - 1)
            blocks = range(first, self._vlm.n_layers)
            again = sum(self._arithmetic.block(layer, width, width) for layer in blocks)
            ends = {(p.receiver.layer, p.receiver.via): p.receiver for p in self._of(sender)}
            inputs = sum((1 + (end.via != "in")) * self._output(end) for end in ends.values())
            flops += rows * (again + width * (inputs + 2 * self._written(sender)))
            flops += n_read * self._arithmetic.unembedding
        kept = self._runs.footprint.kept(self._needed(outputs=True), rows, width, pictures)
        held = {"streams and outputs": kept, "a forward pass": self._runs.footprint.forward(rows, width)}
        held |= {"changes and outputs": self._passing(rows, width)}
        return Work("in order", len(self._complete) + 2, flops, held)

    def _of(self, sender: Address) -> list[Path]:
        return [path for path in self._paths if path.sender == sender]

    def _output(self, end: Receiver) -> int:
        """q, k or v of all heads, or an MLP, of one token."""
        if end.address is None or end.layer is None:
            return 0
        if end.via == "in":
            return self._arithmetic.second(end.layer)
        module = self._vlm.hook_points[f"blocks.{end.layer}.attn.hook_{end.via}"].module
        return self._arithmetic.row(module)

    def _written(self, sender: Address) -> int:
        """What a head writes, of one token; all else is kept as it is."""
        if sender.unit != "head" or sender.layer is None:
            return 0
        block = self._vlm.anatomy.text.blocks[sender.layer]
        return self._arithmetic.row(block.out) // block.n_heads

    def _needed(self, outputs: bool = False) -> list[str]:
        """Streams that receivers are computed from, and what they give out."""
        names = []
        for layer in dict.fromkeys(p.receiver.layer for p in self._paths if p.receiver.layer is not None):
            names += [f"blocks.{layer}.hook_resid_{place}" for place in ("pre", "mid")]
            names += [f"blocks.{layer}.hook_{part}_out" for part in ("attn", "mlp")] if outputs else []
        return names

    def _passing(self, rows: int, width: int) -> int:
        """Changes of the stream in float32, of which some are kept."""
        return 8 * rows * width * self._vlm.d_model * 4
