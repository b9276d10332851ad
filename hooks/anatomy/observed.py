"""The anatomy of a model, found by watching it run: once for shapes and order, once for the equations.

Where towers stand before its decoder it runs twice more, with other pixels and with other words: what follows the
pixels alone sees the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from hooks.anatomy import around
from hooks.anatomy.beside import Beside, with_other_pixels, with_other_words
from hooks.anatomy.blocks import look_at
from hooks.anatomy.nouns import Anatomy, Block, Tower
from hooks.anatomy.precise import half_of, in_float32
from hooks.anatomy.stirred import stirred
from hooks.anatomy.towers import Stack, ends, in_one_stream, stacks
from hooks.anatomy.watching import Call, Record, attention_watched, copied, run, watched
from hooks.errors import FrankenlensError, one_line
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
        told = one_line(error, 200)
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
    stacks = dict.fromkeys(path.rpartition(".")[0] for path in paths)
    silent = [
        name
        for stack in stacks
        for name, _ in model.get_submodule(stack).named_children()
        if f"{stack}.{name}" not in paths
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
        self._first: dict[str, Call] = {}
        self._crossed: dict[Any, Tensor] = {}
        self._absent: dict[str, str] = {}
        self._run()
        self._stacks = in_one_stream(found, self._streams)
        *self._before, self._decoder = self._stacks
        self._embed = around.embedding(model)
        self._pixels, self._words = self._run_beside()

    def _run(self) -> None:
        members = {call.path for stack in self._stacks for call in stack.calls}
        decoder = self._stacks[-1].calls[0].given
        shape = None if decoder is None else decoder.shape
        self._kept = {
            c.path for s in self._stacks for c in s.calls if c.given is not None and c.given.shape == shape
        }
        self._kept |= ends(self._stacks)
        below: list[str] = []
        self._outer: list[str] = []
        for path, _ in self._model.named_modules():
            owner = next((m for m in members if path == m or path.startswith(f"{m}.")), None)
            (self._outer if owner is None else below).append(path)
        record = Record()

        def ended(call: Call) -> None:
            if call.path in members:
                record.paused = True
                self._block_ended(call, record)
                record.paused = False

        self._widths = [
            (one.path, one.given.shape[-1]) for s in self._stacks for one in s.calls if one.given is not None
        ]
        with (
            watched(self._model, self._outer, record, keep=copied),
            watched(self._model, below, record, keep=copied, arguments=frozenset(below), ended=ended),
            attention_watched(record),
            in_float32(self._model, self._precise) as precision,
            stirred(self._model, self._widths, self._precise),
        ):
            self.logits = run(self._model, precision.given(self._inputs))
        refuse_broken(self._model, self.logits)
        inside = set(below)
        self._outside = [call for call in record.calls if call.path not in inside and call.ended >= 0]

    def _block_ended(self, whole: Call, record: Record) -> None:
        """Take the block apart, and let go of what was kept of it."""
        prefix = f"{whole.path}."
        calls = [call for call in record.calls if call.path.startswith(prefix)]
        if whole.path not in self._blocks and whole.given is not None:
            self._blocks[whole.path] = look_at(self._model, whole, calls, record.attended, self._names)
            if whole.path in self._kept:
                post = next((o for o in whole.made.values() if o.shape == whole.given.shape), whole.given)
                self._streams[whole.path] = whole.given, post
            if any(whole.path == stack.calls[0].path for stack in self._stacks):
                self._first[whole.path] = replace(whole, arguments=None, made={})
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

    def _run_beside(self) -> tuple[Beside | None, Beside | None]:
        """The runs with other pixels and with other words, where there are towers before the decoder."""
        if not self._before:
            return None, None
        firsts = [self._first[stack.calls[0].path] for stack in self._stacks]
        paths = [call.path for call in firsts]
        try:
            with (
                in_float32(self._model, self._precise) as precision,
                stirred(self._model, self._widths, self._precise),
            ):
                given = precision.given(self._inputs)
                pixels = with_other_pixels(
                    self._model, given, [*self._outer, *paths], [*self._outside, *firsts]
                )
                return pixels, with_other_words(self._model, given, paths, firsts, self._embed)
        except FrankenlensError as error:
            self._absent["vision"] = self._absent["projector"] = str(error)
            return None, None

    def anatomy(self) -> Anatomy:
        """All that was seen, put together."""
        absent, calls = self._absent, self._outside
        if why := self._positions():
            absent["positions"] = why
        streams = [self._streams[call.path] for call in self._decoder.calls]
        read = around.readout(self._model, self.logits, streams[-1][1], calls)
        if read is None:
            absent["unembed"] = "no linear layer's output is the logits, up to a factor or soft-capping"
        elif not read.final_norm:
            absent["ln_final"] = "no single module stands between the last block and the unembedding"
        entered = around.entry(self._decoder, streams[0][0], calls)
        where, key = (self._embed, "") if entered is None else (entered.path, entered.key)
        self._around = [read.unembed] if read else []
        made = self._projector()
        self._around += [made.weights] if made else []
        added = around.deepstack(streams, calls)
        if unknown := [str(layer) for layer, path in added.items() if not path]:
            absent["sum"] = (
                f"its stream changes behind blocks {', '.join(unknown)}, by what is no single module's output"
            )
        vision, others = self._towers()
        anatomy = Anatomy(
            self._tower(self._decoder, ""), vision, self._embed,
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

    def _follows(self, stack: Stack, what: Beside | None) -> bool:
        """Whether what a tower is given is another where pixels, or words, are others."""
        moved = None if what is None else what.given(self._first[stack.calls[0].path])
        return moved is not None and bool(moved.any())

    def _projector(self) -> around.Projector | None:
        """What hands images to the decoder, or to an encoder of words: as rows of its input, or to read across."""
        if self._pixels is None:
            self._absent.setdefault("projector", "no image")
            return None
        why = "no row of its decoder's input follows the image, and no module's output is what it attends to"
        for stack in (self._decoder, *reversed(self._before)):
            if stack is self._decoder or self._follows(stack, self._words):
                made, reason = self._into(stack, self._pixels)
                if made is not None:
                    return made
                why = reason or why
        made = self._read_across(self._pixels)
        if made is None:
            self._absent["projector"] = why
        return made

    def _into(self, stack: Stack, pixels: Beside) -> tuple[around.Projector | None, str]:
        """What makes the rows of a tower's input that follow the pixels, or why nothing is known to."""
        own = self._first[stack.calls[0].path]
        earlier = [other for other in self._before if other.started < stack.started]
        assert own.given is not None
        if own.given.ndim != 3 or not earlier:
            return None, ""
        entered = around.entry(stack, own.given, self._outside)
        source = own if entered is None else entered
        moved = pixels.given(source)
        if moved is None or not bool(moved.any()) or source.given is None:
            return None, ""
        if self._image is not None and self._image.shape == moved.shape:
            moved = moved & self._image
        words = next((c.out for c in self._outside if c.path == self._embed and c.out is not None), None)
        words = words if words is not None and words.shape == source.given.shape else None
        made, why = around.projector(source.given, moved, words, self._outside, earlier, own.started, pixels)
        return made, why or "no module gives out all the rows of its decoder's input that follow the image"

    def _read_across(self, pixels: Beside) -> around.Projector | None:
        """What hands images to the cross-attention of a decoder that puts none among its tokens."""
        first = self._streams[self._decoder.calls[0].path][0]
        states = self._crossed.get(first.shape)
        own = [s for s in self._before if self._follows(s, pixels) and not self._follows(s, self._words)]
        if states is None or not own:
            return None
        return around.read_across(states, self._outside, [self._root(stack) for stack in own], pixels)

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
        others = [path for other in self._stacks if other is not stack for path in other.lists]
        others += [name for name in self._around if name and not stack.holds(name)]
        path = _common([own.rpartition(".")[0] for own in stack.lists])
        while (parent := path.rpartition(".")[0]) and not any(
            other.startswith(f"{parent}.") for other in others
        ):
            path = parent
        return path

    def _towers(self) -> tuple[Tower, tuple[Tower, ...]]:
        """The vision tower, and the others: an encoder of words, further vision towers, resamplers.

        Of several that see the pixels, and not the words, it is the one with most blocks, the first of equals.
        """
        seeing = [
            s for s in self._before if self._follows(s, self._pixels) and not self._follows(s, self._words)
        ]
        vision = max(seeing, key=lambda stack: len(stack.calls), default=None)
        rest = [stack for stack in self._before if stack is not vision]
        others = tuple(self._tower(stack, f"tower_{place + 2}") for place, stack in enumerate(rest))
        return Tower("", ()) if vision is None else self._tower(vision, ""), others


def _common(paths: Sequence[str]) -> str:
    """The innermost module around all of some."""
    steps = zip(*(path.split(".") for path in paths), strict=False)
    shared = []
    for step in steps:
        if len(set(step)) > 1:
            break
        shared.append(step[0])
    return ".".join(shared)
