"""One batch: clean runs of recipient and donor, and what a change of the residual stream makes of a receiver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from hooks.address import Address
from hooks.engine import HookContext
from hooks.selfcheck_writes import tolerance
from interp.map.cells import Donor
from interp.metrics import Metric
from interp.metrics.logits import sparing_logits
from interp.paths.path import Between, Path, Receiver, sender_hook, writes_at
from interp.prompts import PromptBatch
from interp.prompts.pairing import PatchBatch
from interp.sweep.activations import activation_of
from interp.sweep.edits import Edit, Span
from interp.sweep.rerun import CleanRun

KEPT = 8
"""Intermediate values kept for the next path; paths of one sender or layer follow one another."""


class PathRun:
    """Recipient and donor on one batch.

    A *change* is what is added to the residual stream, [batch pos d_model], in float32 at least; 0 where nothing is.

    Attributes:
        clean: the recipient's run.
        donor: the donor's run.
        rows: the batch with its partners.
    """

    def __init__(
        self,
        recipient: HookedVLM,
        donor: HookedVLM,
        rows: PatchBatch,
        given: PromptBatch,
        where: Bool[Tensor, "batch pos"],
        metric: Metric,
        paths: Sequence[Path],
        between: Between = "frozen",
        in_order: bool = False,
        others: PromptBatch | None = None,
        own_others: PromptBatch | None = None,
    ) -> None:
        """Runs both once.

        Args:
            recipient: the model that is changed.
            donor: the model that senders' values are taken from.
            rows: the recipient's batch.
            given: the donor's batch, lined up with it.
            where: tokens at which senders are changed.
            metric: of these rows.
            paths: what will be asked for.
            between: what passes a change on between sender and receiver; see `interp.paths.path_effects`.
            in_order: keep what `interp.paths.paths_in_order` needs.
            others, own_others: the partners of the donor's rows and of the recipient's, lined up with them; what
                `other` is read from.
        """
        self.vlm, self.rows, self._where, self._between = recipient, rows, where, between
        senders, names = kept_for_paths(recipient, paths, between, in_order)
        read = rows.reads.any(0).nonzero()[:, 0]
        self.clean = CleanRun(recipient, rows.batch.inputs, dict.fromkeys(names), read)
        self.donor = Donor(donor, given, senders, metric, others)
        self._own_of_others: Mapping[str, Tensor] = {}
        if own_others is not None:
            self._own_of_others = CleanRun(
                recipient, own_others.to(recipient.device).inputs, senders, read[-1:]
            ).cache
        self._first = int(where.any(0).nonzero()[0])
        self._kept: dict[tuple, Any] = {}
        self._passed_on: dict[tuple, Tensor] = {}

    def sent(self, sender: Address, other: bool = False) -> Float[Tensor, "batch pos d_model"]:
        """The change that a sender writes: the donor's value minus the recipient's; on another example, if asked."""

        def make() -> Tensor:
            hook, index = sender_hook(sender), sender.index
            kept = self._own_of_others if other else self.clean.cache
            own = activation_of(self.vlm, lambda name: kept[name], hook, index)
            value = self.donor.activation(hook, index, other=other).to(own.device)
            wide = torch.promote_types(own.dtype, torch.float32)
            here = self._where & self.rows.partnered[:, None] if other else self._where
            return torch.where(here[..., None].to(own.device), value.to(wide) - own.to(wide), 0.0)

        return self._recent(("sent", sender, other), make)

    def arriving(self, path: Path, other: bool = False) -> Float[Tensor, "batch pos d_model"]:
        """The change at the receiver's input."""
        change, since = self.sent(path.sender, other), writes_at(path.sender)
        for number, receiver in enumerate(path.through):
            key = (path.sender, path.through[: number + 1], other)
            # Kept for good: it takes a run of its own, which cannot start from within the sweep's.
            if key not in self._passed_on:
                self._passed_on[key] = self._passed(key, change, since, receiver)
            change, since = self._passed_on[key], 2 * (receiver.layer or 0) + (receiver.via == "in")
        layer = self.vlm.n_layers if path.receiver.layer is None else path.receiver.layer
        return self._carried((path.sender, path.through, other), change, since, layer)

    def edit(self, path: Path, other: bool = False) -> Edit:
        """The receiver's output under a path, as an edit of the recipient's run."""
        receiver = path.receiver
        touched = (self.arriving(path, other) != 0).any(-1)
        layer, leaf = received_at(receiver, self.vlm.n_layers)
        key = ("output", path.sender, path.through, layer, leaf, other)

        def new(activation: Tensor, span: Span) -> Tensor:
            if receiver.address is None:
                added = self.arriving(path, other)[:, span.columns]
                return (activation.to(added.dtype) + added.to(activation.device)).to(activation)
            value = self._recent(key, lambda: self.output(receiver, self.arriving(path, other), self._first))
            value = value if receiver.index is None else value[:, :, receiver.index]
            start = max(span.start, self._first)
            written = activation.clone()
            written[:, start - span.start :] = value[:, start - self._first : span.stop - self._first]
            return written

        return Edit(self.vlm.hook_points[f"blocks.{layer}.{leaf}"], new, touched, receiver.index)

    def whole(self, sender: Address, other: bool = False) -> Edit:
        """An ordinary patch of a sender."""
        change = self.sent(sender, other)
        touched = (change != 0).any(-1)

        def new(activation: Tensor, span: Span) -> Tensor:
            added = self.sent(sender, other)[:, span.columns]
            return (activation.to(added.dtype) + added.to(activation.device)).to(activation)

        return Edit(self.vlm.hook_points[sender_hook(sender)], new, touched, sender.index)

    def output(
        self, receiver: Receiver, change: Float[Tensor, "batch pos d_model"], first: int = 0
    ) -> Float[Tensor, "..."]:
        """q, k or v of all heads [batch pos head d_head], or an MLP's output, with a change added to their input.

        The pre-norm sees the changed stream: its scale is computed again, not frozen. Columns before `first` are left
        out.
        """
        layer = receiver.layer
        assert layer is not None
        if receiver.via == "in":
            return self.mlp(layer, self.stream(layer, "mid", change)[:, first:])
        return self.project(layer, receiver.via, self.stream(layer, "pre", change)[:, first:])

    def check(self, paths: Sequence[Path]) -> None:
        """Every receiver's output, computed from the clean stream as paths compute it, is the clean run's.

        Raises:
            FrankenlensError: it is not; the architecture does something between stream and receiver.
        """
        receivers = {
            (r.layer, r.via): r for path in paths for r in (*path.through, path.receiver) if r.address
        }
        names = {
            (layer, via): f"blocks.{layer}.hook_mlp_out" if via == "in" else f"blocks.{layer}.attn.hook_{via}"
            for layer, via in receivers
        }
        if not names:
            return
        inputs = self.rows.batch.inputs
        with sparing_logits(self.vlm) as extra:
            points = list(dict.fromkeys(names.values()))
            _, cache = self.vlm.run_with_cache(inputs, points, use_cache=False, **extra)
        real = self.rows.batch.mask("all")
        for place, receiver in receivers.items():
            expected = cache[names[place]]
            got = self.output(receiver, torch.zeros_like(self._stream_of(receiver)))
            error = (got - expected)[real.to(got.device)].abs().max().item()
            if not error <= tolerance(expected):
                raise FrankenlensError(
                    f"{names[place]} of {type(self.vlm.model).__name__} does not follow from the residual stream, its "
                    f"norm and its projection alone (off by {error:.1e}); paths cannot be patched in it."
                )

    def _stream_of(self, receiver: Receiver) -> Float[Tensor, "batch pos d_model"]:
        place = "mid" if receiver.via == "in" else "pre"
        return self.clean.cache[f"blocks.{receiver.layer}.hook_resid_{place}"]

    def stream(
        self, layer: int, place: str, change: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The clean stream before a block ("pre") or its MLP ("mid") with a change added."""
        own = self.clean.cache[f"blocks.{layer}.hook_resid_{place}"]
        return (own.to(change.dtype) + change.to(own.device)).to(own)

    def project(
        self, layer: int, letter: str, stream: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """q, k or v of all heads on a stream: pre-norm, then projection."""
        point = self.vlm.hook_points[f"blocks.{layer}.attn.hook_{letter}"]
        norm = self.vlm.module(self.vlm.anatomy.text.blocks[layer].pre_norm)
        # forward, not __call__: the edit that asks for this is itself a hook on the projection.
        out = self.vlm.module(point.module).forward(norm.forward(stream))
        assert point.split is not None
        return point.split.of(out)

    def mlp(self, layer: int, mid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What an MLP makes of a stream: pre-norm, then MLP."""
        block = self.vlm.anatomy.text.blocks[layer]
        out = self.vlm.module(block.mlp).forward(self.vlm.module(block.mid_norm).forward(mid))
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(mid.shape)  # Llama 4's experts have the tokens in a row

    def _mlp_change(self, layer: int, change: Tensor) -> Float[Tensor, "batch pos d_model"]:
        new = self.mlp(layer, self.stream(layer, "mid", change))
        difference = new.to(change.dtype) - self.clean.cache[f"blocks.{layer}.hook_mlp_out"].to(change.dtype)
        return torch.where((change != 0).any(-1, keepdim=True).to(new.device), difference, 0.0)

    def _carried(
        self, key: tuple, change: Tensor, since: int, layer: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """A change at a layer's first input, the MLPs on the way having added what it made of them, if they do."""
        first = (since + 1) // 2  # the first layer whose MLP lies after `since`
        if self._between == "frozen" or layer <= first:
            return change

        def make() -> Tensor:
            before = self._carried(key, change, since, layer - 1)
            return before + self._mlp_change(layer - 1, before).to(before.device)

        return self._recent(("carried", key, layer), make)

    def _passed(
        self, key: tuple, change: Tensor, since: int, receiver: Receiver
    ) -> Float[Tensor, "batch pos d_model"]:
        """How a receiver's component changes what it writes."""
        layer = receiver.layer
        assert layer is not None
        if receiver.via == "in":
            return self._mlp_change(layer, change)
        change = self._carried(("before", *key), change, since, layer)
        value = self.output(receiver, change)
        touched = (change != 0).any(-1)
        seen: list[Tensor] = []

        def write(activation: Tensor, hook: HookContext) -> Tensor:
            new = activation.clone()
            here = touched[..., None].to(new.device)
            index = receiver.index
            new[:, :, index] = torch.where(here, value[:, :, index].to(new), new[:, :, index])
            return new

        out = f"blocks.{layer}.hook_attn_out"
        read = (out, lambda activation, hook: seen.append(activation.detach().clone()))
        self.clean.rerun([(f"blocks.{layer}.attn.hook_{receiver.via}", write), read])
        difference = seen[-1].to(change.dtype) - self.clean.cache[out].to(change.dtype)
        reached = touched if receiver.via == "q" else touched.cumsum(1).bool()
        return torch.where(reached[..., None].to(difference.device), difference, 0.0)

    def _recent(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        value = self._kept.pop(key) if key in self._kept else make()
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = value  # the last one asked for stays longest
        return value


def kept_for_paths(
    vlm: HookedVLM, paths: Sequence[Path], between: Between, in_order: bool
) -> tuple[list[str], list[str]]:
    """Hook points kept of the donor, and of the recipient."""
    senders = _stored(sender_hook(path.sender) for path in paths)
    return senders, [*senders, *_needed(vlm, paths, between == "mlps", in_order)]


def received_at(receiver: Receiver, n_layers: int) -> tuple[int, str]:
    """Layer and hook point of what a receiver makes of its input."""
    if receiver.address is None or receiver.layer is None:
        return n_layers - 1, "hook_resid_post"
    return receiver.layer, "hook_mlp_out" if receiver.via == "in" else f"attn.hook_{receiver.via}"


def _stored(hooks: Iterable[str]) -> list[str]:
    """The hook points kept for these; heads' results are made again from z, which is smaller."""
    return list(dict.fromkeys(hook.replace("hook_result", "hook_z") for hook in hooks))


def _needed(vlm: HookedVLM, paths: Sequence[Path], mlps: bool, in_order: bool) -> list[str]:
    """Streams and outputs of the recipient that its receivers are computed from."""
    names = []
    for path in paths:
        for receiver in (*path.through, path.receiver):
            if receiver.address is None:
                continue
            block, passes = f"blocks.{receiver.layer}", in_order or receiver is not path.receiver
            if receiver.via == "in":
                names += [f"{block}.hook_resid_mid"] + [f"{block}.hook_mlp_out"] * passes
            else:
                names += [f"{block}.hook_resid_pre"] + [f"{block}.hook_attn_out"] * passes
    if in_order:
        names.append(f"blocks.{vlm.n_layers - 1}.hook_resid_post")
    if mlps:
        first = min((writes_at(path.sender) + 1) // 2 for path in paths)
        for layer in range(first, vlm.n_layers):
            names += [f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out"]
    return names
