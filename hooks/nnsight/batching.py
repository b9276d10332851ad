"""Several invokes as one batch: which part of every hook point belongs to which invoke.

nnsight cuts any tensor whose first axis happens to be as long as the batch. Here the hook point's own axes say what is
cut: rows of the decoder's tensors and their own tokens (the padding that joining added is not shown), the images or
packed patches of the vision tower's. Nothing else is ever cut; multimodal position ids are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from nnsight.intervention.batching import Batcher
from torch import Tensor

from hooks.errors import FrankenlensError

_TOKEN_AXES = ("pos", "query", "key")
_PATCH_AXES = ("patch", "query", "key")


class HookBatcher(Batcher):
    """Collects invokes, joins them with right padding, and cuts hook points by their axes.

    Attributes:
        provider: name of the hook point that is being served; set by the interleaver.
    """

    provider: str = ""

    def joined(self, vlm: Any) -> dict[str, Any]:
        """The keywords of the one forward pass."""
        inputs = [{**given[0], **keywords} for given, keywords in self.invokes]
        if len(inputs) == 1:
            return inputs[0]
        self._inputs, self._points, config = inputs, vlm.hook_points, vlm.model.config
        self._image_token = getattr(config, "image_token_id", None) or config.image_token_index
        tokenizer = getattr(vlm.processor, "tokenizer", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        self._width = max(one["input_ids"].shape[1] for one in inputs)
        return {name: self._join(name, inputs, 0 if pad is None else pad) for name in _names(inputs)}

    def narrow(self, value: Any, group: Any) -> Any:
        """An invoke's own part of what is served."""
        if not self.batching or group is None:
            return value
        if self.provider == "result":
            rows = slice(group[0], sum(group))
            whole = value.logits.shape[1] == self._width
            columns = slice(self._own(group)["input_ids"].shape[1]) if whole else slice(None)
            return type(value)(logits=value.logits[rows, columns])
        return value[self._part(value, group)]

    def widen(self, full: Any, group: Any, edited: Any) -> Any:
        """What is served, with an invoke's own part replaced."""
        if not self.batching or group is None:
            return edited
        if self.provider == "result":
            raise FrankenlensError("tracer.result of several invokes is read only.")
        part = self._part(full, group)
        if edited.shape != full[part].shape:
            raise FrankenlensError(
                f"{self.provider}: {tuple(edited.shape)} written, expected {tuple(full[part].shape)} for this invoke."
            )
        new = full.clone()
        new[part] = edited.to(new.dtype)
        return new

    def _own(self, group: Any) -> Mapping[str, Any]:
        return self._inputs[self._index(group)]

    def _index(self, group: Any) -> int:
        starts = torch.tensor([0, *(one["input_ids"].shape[0] for one in self._inputs)]).cumsum(0)
        return starts.tolist().index(group[0])

    def _part(self, value: Tensor, group: Any) -> tuple[slice, ...]:
        point = self._points[self.provider]
        in_text = not self.provider.startswith(("vision.", "projector.")) and "image_token" not in point.axes
        if in_text:
            width = self._own(group)["input_ids"].shape[1]
            cuts = {"batch": slice(group[0], sum(group)), **dict.fromkeys(_TOKEN_AXES, slice(width))}
        elif "image" in point.axes:
            cuts = {"image": self._span("image", value.shape[0], group)}
        elif "image_token" in point.axes:
            cuts = {"image_token": self._span("image_token", value.shape[0], group)}
        else:
            total = value.shape[point.axes.index("patch" if "patch" in point.axes else "key")]
            cuts = dict.fromkeys(_PATCH_AXES, self._span("patch", total, group))
        return tuple(cuts.get(axis, slice(None)) for axis in point.axes)

    def _span(self, axis: str, total: int, group: Any) -> slice:
        """The images, packed patches or image tokens of one invoke among those of all."""
        counts = [self._count(axis, one) for one in self._inputs]
        if sum(counts) != total:
            raise FrankenlensError(
                f"{self.provider} has {total} along {axis!r}, but the invokes' images make {sum(counts)}: it cannot be "
                "told whose they are. Run these prompts in traces of their own."
            )
        index = self._index(group)
        if not counts[index]:
            raise FrankenlensError(f"{self.provider}: this invoke's inputs hold no image.")
        return slice(sum(counts[:index]), sum(counts[: index + 1]))

    def _count(self, axis: str, inputs: Mapping[str, Any]) -> int:
        if "pixel_values" not in inputs:
            return 0
        if axis == "image_token":
            return int((inputs["input_ids"] == self._image_token).sum())
        if axis == "patch":
            return int(inputs["image_grid_thw"].prod(-1).sum())
        images = inputs["pixel_values"].flatten(0, -4)
        return int(images.flatten(1).any(-1).sum()) if inputs["pixel_values"].ndim == 5 else len(images)

    def _join(self, name: str, inputs: Sequence[Mapping[str, Any]], pad: int) -> Any:
        values = [one.get(name) for one in inputs]
        if name == "attention_mask":
            values = [
                torch.ones_like(one["input_ids"]) if v is None else v for v, one in _pairs(values, inputs)
            ]
        tokens = all(getattr(v, "shape", None) == one["input_ids"].shape for v, one in _pairs(values, inputs))
        given = [v for v in values if v is not None]
        if tokens:
            fill = pad if name == "input_ids" else 0
            grow: Any = torch.nn.functional.pad
            return torch.cat([grow(v, (0, self._width - v.shape[1]), value=fill) for v in given])
        images = name.startswith(("pixel_", "image_"))
        if images and all(isinstance(v, Tensor) for v in given):
            return _stacked(name, given)
        if len(given) == len(values) and all(type(v) is type(given[0]) and v is given[0] for v in given):
            return given[0]
        raise FrankenlensError(
            f"{name!r} of several invokes cannot be joined; run them in traces of their own."
        )


def _pairs(
    values: Sequence[Any], inputs: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    return zip(values, inputs, strict=True)


def _names(inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    # The mask is what tells the padding from the prompt, so there must be one.
    return list(dict.fromkeys(name for one in inputs for name in ("attention_mask", *one)))


def _stacked(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Images one after another; rows that hold fewer tiles (axis 1 of [row tile ...]) are padded with zeros."""
    tiled = tensors[0].ndim == 5 or (name == "pixel_attention_mask" and tensors[0].ndim == 4)
    if tiled:
        most = max(tensor.shape[1] for tensor in tensors)
        tensors = [
            torch.cat([t, t.new_zeros(t.shape[0], most - t.shape[1], *t.shape[2:])], dim=1) for t in tensors
        ]
    try:
        return torch.cat(list(tensors))
    except RuntimeError as error:
        shapes = ", ".join(dict.fromkeys(str(tuple(t.shape)) for t in tensors))
        raise FrankenlensError(f"{name} of these invokes cannot be joined, shapes {shapes}.") from error
