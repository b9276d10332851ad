"""Bytes that exist together while a model runs: what is kept, and what one block or the logits need in passing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from hooks import HookedVLM
from hooks.anatomy import Block
from hooks.batches import at_once
from hooks.weights import d_mlp
from interp.plan.images import Pictures
from interp.sweep.attention import SHORT
from interp.sweep.edits import Edit, needed_names
from interp.sweep.halves import Halves
from interp.sweep.places import of_vision
from interp.sweep.planned import PlannedSweep
from interp.sweep.stored import streams

WIDE = 4
"""Bytes of a float32 number."""


class Footprint:
    """Sizes of what one model makes.

    Args:
        vlm: the model; its weights may be on the meta device.
    """

    def __init__(self, vlm: HookedVLM) -> None:
        self._vlm, self._blocks = vlm, vlm.anatomy.text.blocks
        self._item = vlm.model.dtype.itemsize
        self._mlps = [_neurons(vlm, block) for block in self._blocks]
        config: Any = vlm.model.config.get_text_config()
        sinks = any(name.endswith(".sinks") for name, _ in vlm.model.named_parameters())
        self._special = bool(getattr(config, "attn_logit_softcapping", None)) or sinks
        self._eager = getattr(config, "_attn_implementation", None) == "eager"

    def kept(self, names: Iterable[str], rows: int, tokens: int, pictures: Pictures) -> int:
        """Activations of these points, kept once each."""
        total = 0
        for name in dict.fromkeys(names):
            if of_vision(name):
                total += self._of_images(name, pictures)
            else:
                total += rows * tokens * self._width(name)
        return total * self._item

    def _width(self, name: str) -> int:
        """Numbers a token."""
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        leaf, block = name.rpartition(".")[2], self._blocks[layer]
        if leaf == "hook_post":
            return self._mlps[layer]
        if leaf in ("hook_z", "hook_q", "hook_rot_q"):
            return block.n_heads * block.d_head
        if leaf in ("hook_k", "hook_v", "hook_rot_k"):
            return block.n_kv_heads * block.d_head
        return self._vlm.d_model

    def _of_images(self, name: str, pictures: Pictures) -> int:
        if name.startswith("vision."):
            return sum(pictures.patches) * self._vlm.anatomy.vision.width
        return sum(pictures.tokens) * self._vlm.d_model

    def keys(self, rows: int, tokens: int) -> int:
        """Keys and values of all blocks."""
        sites = [site for block in self._blocks for site in block.sites]
        wide = sum(site.n_kv_heads * (site.d_head + site.d_value) for site in sites)
        return rows * tokens * wide * self._item

    def weights(self) -> int:
        """The model's own, and its buffers."""
        own: Any = [*self._vlm.model.parameters(), *self._vlm.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in own)

    def forward(self, rows: int, tokens: int, looked_at: bool = False) -> int:
        """What a forward pass holds in its widest block, stream included; with patterns that are looked at, or not."""
        way = "dense" if self._eager or looked_at else ""
        return self.stream(rows, tokens) + self._passing(rows, tokens, tokens, way)

    def lanes(self, rows: int, queries: int, keys: int, dense: bool = False) -> int:
        """What lanes hold together in their widest block, and where they join, streams included.

        Args:
            rows: of all lanes.
            queries, keys: tokens that they run on and that these may look at.
            dense: whether scores and pattern are looked at.
        """
        way = "dense" if dense or self._special else "shared" if queries <= SHORT else "copied"
        joined = self.stream(rows, queries)
        return joined + max(self._passing(rows, queries, keys, way), joined)

    def _passing(self, rows: int, queries: int, keys: int, way: str) -> int:
        """What the widest block holds beside its stream: in attention, or in its MLP.

        Args:
            rows, queries, keys: as in `lanes`.
            way: in which it attends: "dense" with scores, keys copied for every row and query head; "copied" without
                scores; "shared" with scores, and keys that all rows share; "" with neither.
        """
        sizes = zip(self._blocks, self._mlps, strict=True)
        return max(
            max(self._attending(block, rows, queries, keys, way), self._mlp(neurons, rows, queries))
            for block, neurons in sizes
        )

    def _attending(self, block: Block, rows: int, queries: int, keys: int, way: str) -> int:
        d, site = self._vlm.d_model, block.site
        if site is None:
            return 3 * rows * queries * d * self._item
        q, kv = site.n_heads * site.d_head, site.n_kv_heads * (site.d_head + site.d_value)
        groups = site.n_heads // site.n_kv_heads
        copies = {"dense": 1 + groups * (groups > 1), "copied": 1}.get(way, 0)
        scores = 3 * rows * site.n_heads * queries * keys if way in ("dense", "shared") else 0
        own = rows * queries * (2 * d + 3 * q + kv)
        return (own + copies * rows * keys * kv) * self._item + scores * max(self._item, WIDE)

    def _mlp(self, neurons: int, rows: int, queries: int) -> int:
        return rows * queries * (3 * neurons + 2 * self._vlm.d_model) * self._item

    def saved(self, rows: int, tokens: int, blocks: int | None = None) -> int:
        """What a gradient needs of so many blocks (None: all): inputs of norms, products and activations."""
        total = 0
        for block, neurons in list(zip(self._blocks, self._mlps, strict=True))[:blocks]:
            site = block.site
            inside = 0 if site is None else 3 * site.n_heads * site.d_head
            inside += 0 if site is None else 2 * site.n_kv_heads * (site.d_head + site.d_value)
            total += 6 * self._vlm.d_model + inside + 4 * neurons
        return rows * tokens * total * self._item

    def kept_of_tower(self, pictures: Pictures) -> int:
        """The same of the vision tower, whose MLPs are taken to be four times as wide as it is."""
        tower = self._vlm.anatomy.vision
        return sum(pictures.patches) * len(tower.blocks) * (6 + 5 + 4 * 4) * tower.width * self._item

    def stream(self, rows: int, tokens: int) -> int:
        """The residual stream once."""
        return rows * tokens * self._vlm.d_model * self._item

    def logits(self, places: int) -> int:
        """Of places whose logits are read: as made, in float32, and what they are weighed with."""
        n_words = self._vlm.n_logits
        return 3 * WIDE * n_words * min(places, at_once(n_words, self._vlm.device))


def _neurons(vlm: HookedVLM, block: Block) -> int:
    """Of a block's MLP; of one of experts, of all that a token goes to."""
    writer = block.writer("mlp", "moe")
    if writer is None:
        return 0
    if writer.last is not None:
        return d_mlp(vlm.model, block)
    config: Any = vlm.model.config.get_text_config()
    own = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    return (own or 4 * vlm.d_model) * chosen


def held_by_sweep(
    footprint: Footprint, planned: PlannedSweep, pictures: Pictures, still: Collection[int] = ()
) -> dict[str, int]:
    """Item to bytes of a planned sweep at its widest moment.

    That is a pass of lanes, or the check before them, in which two copies of the batch attend with their pattern.

    Args:
        footprint: of its model.
        planned: the sweep.
        pictures: the images of its batch.
        still: numbers of interventions that change nothing, and do not ride.
    """
    vlm, (rows, width) = planned.vlm, planned.batch.roles.shape
    halves = [Halves(vlm, layer) for layer in range(vlm.n_layers)]
    edits = [edit for edits in planned.interventions for edit in edits]
    _, _, groups = planned.grouped(range(len(planned.interventions)))
    held, passing = {}, {"a forward pass": footprint.forward(rows, width)}
    if planned.shortcuts == "tokens and layers":
        names = [*streams(vlm, halves), *needed_names(edits, vlm)]
        held["streams, keys and values of the clean run"] = footprint.kept(
            names, rows, width, pictures
        ) + footprint.keys(rows, planned.end)
        half = planned.end - planned.end // 2
        passing["the check of the shortcuts"] = footprint.lanes(2 * rows, half, planned.end, dense=True)
    for span, lanes in groups:
        size = planned.lanes_of(span)
        for some in (lanes[at : at + size] for at in range(0, len(lanes), size)):
            riding = sum(number not in still and _attends(edit, vlm.n_layers - 1) for number, edit in some)
            inside = any(edit.stage == "inside" for _, edit in some)
            own = footprint.lanes(riding * rows, len(span), span.stop, inside)
            passing["lanes that run at once"] = max(own, passing.get("lanes that run at once", 0))
    held["logits that are read"] = footprint.logits(planned.n_read)
    widest = max(passing, key=lambda name: passing[name])
    return {**held, widest: passing[widest]}


def _attends(edit: Edit, last: int) -> bool:
    """Whether a lane runs the attention of any block."""
    return edit.start[0] < last or edit.stage in ("pre", "inside")
