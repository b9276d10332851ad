"""The anatomy of a model, found by watching two forward passes: one for shapes and order, one for the equations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from hooks.anatomy import around
from hooks.anatomy.blocks import look_at
from hooks.anatomy.nouns import Anatomy, Block, Tower
from hooks.anatomy.precise import half_of, in_float32
from hooks.anatomy.stirred import stirred
from hooks.anatomy.towers import Stack, stacks
from hooks.anatomy.watching import Call, Record, attention_watched, copied, has_pixels, run, watched
from hooks.errors import FrankenlensError
from hooks.refusals import refuse_broken


def observed_anatomy(
    model: nn.Module, inputs: Mapping[str, Any], image_token_id: int | None = None
) -> Anatomy:
    """Watch the model run on one prompt.

    Args:
        model: the model, in evaluation mode.
        inputs: processor tensors on its device; with an image, where the vision side is to be found.
        image_token_id: the placeholder of image tokens, where there is one.

    Raises:
        FrankenlensError: it has no stack of blocks through which a stream runs, or no logits.
    """
    paths = [path for path, _ in model.named_modules()]
    record = Record()
    with watched(model, paths, record), attention_watched(record):
        run(model, inputs)
    found = stacks(model, record)
    if not found:
        raise FrankenlensError(
            f"{type(model).__name__}: no stack of blocks was seen that return a stream of the shape they are given, so "
            "there is no residual stream to read or write."
        )
    image = _image_mask(inputs, image_token_id)
    try:
        return _Looking(model, inputs, image, found).anatomy()
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except Exception as error:
        if half_of(model) is None:
            raise
        told = " ".join(str(error).split())[:200] or type(error).__name__
    why = (
        f"it does not run in float32 ({told}); what its own precision does not show bit for bit is not known"
    )
    seen = _Looking(model, inputs, image, found, precise=False).anatomy()
    return replace(seen, absent={"float32": why, **seen.absent})


def require_all_blocks(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse an anatomy that was seen without an image, where some decoder blocks run only with one.

    Raises:
        FrankenlensError: names them; the blocks behind them would have other numbers.
    """
    paths = [block.path for block in anatomy.text.blocks]
    stack = paths[0].rpartition(".")[0]
    silent = [
        name for name, _ in model.get_submodule(stack).named_children() if f"{stack}.{name}" not in paths
    ]
    if silent:
        raise FrankenlensError(
            f"{type(model).__name__}: decoder blocks {', '.join(silent)} do not run without an image, so the others "
            "would have other numbers. Give the model's processor, or `inputs` with an image."
        )


def _image_mask(inputs: Mapping[str, Any], image_token_id: int | None) -> Bool[Tensor, "batch pos"] | None:
    ids = inputs.get("input_ids")
    if image_token_id is None or not isinstance(ids, Tensor):
        return None
    mask = ids == image_token_id
    return mask if bool(mask.any()) else None


class _Looking:
    """The second forward, in float32: blocks are taken apart as they end, so that only one is held at a time."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        image: Bool[Tensor, "batch pos"] | None,
        found: list[Stack],
        *,
        precise: bool = True,
    ) -> None:
        self._precise = precise
        self._model, self._inputs, self._image, self._stacks = model, inputs, image, found
        self._names = {id(module): name for name, module in model.named_modules()}
        self._blocks: dict[str, Block] = {}
        self._streams: dict[str, tuple[Tensor, Tensor]] = {}
        self._first: dict[str, tuple[Tensor, int]] = {}
        self._crossed: dict[Any, Tensor] = {}
        self._decoder = found[-1]
        self._outside: list[Call] = []
        self._run()

    def _run(self) -> None:
        members = {call.path for stack in self._stacks for call in stack.calls}
        below: list[str] = []
        outside: list[str] = []
        for path, _ in self._model.named_modules():
            owner = next((m for m in members if path == m or path.startswith(f"{m}.")), None)
            (outside if owner is None else below).append(path)
        record = Record()

        def ended(call: Call) -> None:
            if call.path in members:
                record.paused = True
                self._block_ended(call, record)
                record.paused = False

        widths = [
            (one.path, one.given.shape[-1]) for s in self._stacks for one in s.calls if one.given is not None
        ]
        with (
            watched(self._model, outside, record, keep=copied),
            watched(self._model, below, record, keep=copied, arguments=frozenset(below), ended=ended),
            attention_watched(record),
            in_float32(self._model, self._precise) as precision,
            stirred(self._model, widths, self._precise),
        ):
            self.logits = run(self._model, precision.given(self._inputs))
        refuse_broken(self._model, self.logits)
        self._outside = [call for call in record.calls if call.path not in set(below)]

    def _block_ended(self, whole: Call, record: Record) -> None:
        """Take the block apart, and let go of what was kept of it."""
        prefix = f"{whole.path}."
        calls = [call for call in record.calls if call.path.startswith(prefix)]
        if whole.path not in self._blocks and whole.given is not None:
            self._blocks[whole.path] = look_at(self._model, whole, calls, record.attended, self._names)
            post = next((out for out in whole.made.values() if out.shape == whole.given.shape), whole.given)
            stack = next(s for s in self._stacks if whole.path.startswith(f"{s.path}."))
            if stack.path == self._decoder.path:
                self._streams[whole.path] = whole.given, post
            self._first.setdefault(stack.path, (whole.given, whole.started))
            self._note_crossing(whole, calls)
        dropped = {id(call) for call in calls} | {id(whole)}
        record.calls[:] = [call for call in record.calls if id(call) not in dropped]
        record.attended.clear()

    def _note_crossing(self, whole: Call, calls: list[Call]) -> None:
        """Keep what the first cross-attention to a stream of this shape makes its keys of."""
        site = next((one for one in self._blocks[whole.path].sites if one.cross and one.k is not None), None)
        if site is None or site.k is None or whole.given is None or whole.given.shape in self._crossed:
            return
        given = next((call.given for call in calls if call.path == site.k.module), None)
        if given is not None:
            self._crossed[whole.given.shape] = given

    def anatomy(self) -> Anatomy:
        """All that was seen, put together."""
        absent: dict[str, str] = {}
        if why := self._positions():
            absent["positions"] = why
        streams = list(self._streams.values())
        calls = [call for call in self._outside if call.ended >= 0]
        embed = around.embedding(self._model)
        read = around.readout(self._model, self.logits, streams[-1][1], calls)
        if read is None:
            absent["unembed"] = "no linear layer's output is the logits, up to a factor or soft-capping"
        elif not read.final_norm:
            absent["ln_final"] = "no single module stands between the last block and the unembedding"
        first = streams[0][0]
        entered = around.entry(self._decoder, first, calls)
        where, key = (embed, "") if entered is None else (entered.path, entered.key)
        before = [stack for stack in self._stacks if stack.started < self._decoder.started]
        self._ends = [read.unembed] if read else []
        made = self._projector(calls, before, embed) or self._read_across(calls, before, first)
        if made is None:
            absent["projector"] = (
                "no module that runs once gives out rows of the decoder's input" if before else "no image"
            )
        added = around.deepstack(streams, calls)
        self._ends = [name for name in (read.unembed if read else "", made.weights if made else "") if name]
        text = self._tower(self._decoder, "")
        towers = [self._tower(stack, "") for stack in before]
        vision, others = self._sorted(towers, made)
        anatomy = Anatomy(
            text, vision, embed,
            read.final_norm if read else "", read.unembed if read else "",
            made.module if made else "", made.key if made else None, made.weights if made else "",
            {layer: path for layer, path in added.items() if path}, where, key, others,
            read.softcap if read else None, read.scale if read else 1.0, absent,
        )  # fmt: skip
        return anatomy

    def _positions(self) -> str:
        """Why logits and tokens do not stand side by side; "" where they do."""
        ids = self._inputs.get("input_ids")
        if "decoder_input_ids" in self._inputs:
            return "its logits are of decoder_input_ids"
        if not isinstance(ids, Tensor):
            return "it is not given input_ids"
        if self.logits.ndim != 3 or self.logits.shape[:2] != ids.shape:
            return f"its logits are {list(self.logits.shape[:-1])} where the prompt is {list(ids.shape)}"
        return ""

    def _projector(self, calls: list[Call], before: list[Stack], embed: str) -> around.Projector | None:
        """What hands image rows to the decoder, or to the encoder of an encoder-decoder."""
        for stack in (self._decoder, *reversed(before)):
            first, started = self._first[stack.path]
            fits = self._image is not None and first.shape[:-1] == self._image.shape
            earlier = [other for other in before if other.started < stack.started]
            if first.ndim == 3 and earlier and (fits or self._image is None):
                entered = around.entry(stack, first, calls)
                handed = first if entered is None or entered.given is None else entered.given
                words = next((c.out for c in calls if c.path == embed and c.out is not None), None)
                words = words if words is not None and words.shape == handed.shape else None
                image = self._image if fits else None
                made = around.projector(handed, image, words, calls, earlier, started)
                if made is not None:
                    return made
        return None

    def _read_across(self, calls: list[Call], before: list[Stack], first: Tensor) -> around.Projector | None:
        """What hands images to the cross-attention of a decoder that puts none among its tokens."""
        states = self._crossed.get(first.shape)
        own = [stack for stack in before if self._first[stack.path][0].shape != first.shape]
        if states is None or not own or not has_pixels(self._inputs):
            return None
        return around.read_across(states, calls, [self._root(stack) for stack in own])

    def _tower(self, stack: Stack, name: str) -> Tower:
        blocks = tuple(self._blocks[call.path] for call in stack.calls if call.path in self._blocks)
        given = stack.calls[0].given
        packed = given is not None and given.ndim == 2
        path = self._root(stack)
        width, ndim = (int(given.shape[-1]), given.ndim) if given is not None else (0, 3)
        ids = self._inputs.get("input_ids")
        last = given is not None and isinstance(ids, Tensor) and given.shape[:2] == ids.shape
        streams = (2 if last else 0) if ndim == 4 and stack is self._decoder else None
        return Tower(path, blocks, packed, name, width, ndim, streams)

    def _root(self, stack: Stack) -> str:
        """The largest module around a stack that holds no other stack, nor what comes before or after it."""
        others = [other.path for other in self._stacks if other is not stack]
        others += [name for name in self._ends if not name.startswith(f"{stack.path}.")]
        path = stack.path.rpartition(".")[0]
        while (parent := path.rpartition(".")[0]) and not any(
            other.startswith(f"{parent}.") for other in others
        ):
            path = parent
        return path

    def _sorted(self, towers: list[Tower], made: around.Projector | None) -> tuple[Tower, tuple[Tower, ...]]:
        """The vision tower, and the others: an encoder of text, further vision towers, resamplers."""
        if not towers:
            return Tower("", ()), ()
        vision = max(towers, key=lambda tower: len(tower.blocks))
        rest = [tower for tower in towers if tower is not vision]
        return vision, tuple(replace(tower, name=f"tower_{place + 2}") for place, tower in enumerate(rest))
