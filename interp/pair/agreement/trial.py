"""Whether settings of a model enter its forward pass: it is computed with them, on weights that cost nothing.

A model of the same class (`hooks.anatomy.rebuilt`) is run with the settings of one checkpoint, and again, on the same
weights, with some settings of the other. What a short prompt cannot show, a window or a scaling of long contexts, is
tried with all lengths brought within its reach, in both. Settings that are read neither while the model is built nor
while it runs cannot act at any length, and are not tried there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hooks.anatomy.rebuilt import rebuilt, weightless
from hooks.anatomy.watching import forward
from interp.pair.agreement.difference import Setting, acting, with_settings
from interp.pair.agreement.shortened import shortened

Values = dict[Setting, Any]
_LENGTH = re.compile(
    r"max_position|max_seq|max_len|max_source|max_target|n_positions|n_ctx|window|chunk|context|floor|seq_len"
)
_TOKEN = re.compile(r"_id$|_ids$|_index$")
_SHOWS = 1e-3
_REACH = 8
"""Lengths up to this show on a prompt of a few words as they are; larger ones become 4, 7, 10 and so on, in order."""


def entering_settings(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    ours: Values,
    theirs: Values,
    which: Sequence[Setting],
    inputs: Mapping[str, Any],
) -> list[Setting]:
    """Those of some settings that change what a model computes.

    Args:
        kind: class of the model.
        config: its configuration, the settings of which are `ours`.
        ours, theirs: settings of both.
        which: those that are not alike.
        inputs: a prompt that the model takes.

    Raises:
        Exception: what the model raises with its own settings.
    """
    if not which:
        return []
    prompts = [_on_cpu(inputs), *_of_video(config, _on_cpu(inputs))]
    with _reads() as read:
        first, ours, theirs = _first(kind, config, ours, theirs, which, prompts)
        config = first.config
        found = acting(which, lambda some: first.changes(with_settings(config, theirs, some)))
    left = [one for one in which if one not in found and _reader(config, one) in read]
    if not left:
        return found
    known = [one for one in {**ours, **theirs} if _reader(config, one) in read]
    lengths = [one for one in known if _is_length(one, one in left)]
    own, other, far = _brought_near(first, ours, theirs, lengths)
    for one in left:
        factor = _enlarging(ours.get(one), theirs.get(one))
        own |= {one: ours[one] * factor} if factor else {}
        other |= {one: theirs[one] * factor} if factor else {}
    near = with_settings(config, own, own)
    second, others = _StandIn(kind, near, first.prompts, first.model), {**theirs, **other}
    rest = [one for one in left if one not in far]
    found += acting(rest, lambda some: second.changes(with_settings(near, others, some)))
    return [*found, *(one for one in left if one in far)]


def _first(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    ours: Values,
    theirs: Values,
    which: Sequence[Setting],
    prompts: Sequence[Mapping[str, Any]],
) -> tuple[_StandIn, Values, Values]:
    """The stand-in and both settings, with as few layers as show all there is; with all where fewer do not run."""
    try:
        both = (config, with_settings(config, theirs, which))
        own, other = shortened(ours, theirs, [weightless(kind, one) for one in both])
        return _StandIn(kind, with_settings(config, own, own), prompts), ours | own, theirs | other
    except Exception:  # settings of theirs that this class refuses are told apart later, one by one
        return _StandIn(kind, config, prompts), ours, theirs


class _StandIn:
    """A model with weights that cost nothing, and what it computes.

    Attributes:
        prompts: those that it takes; the first, at least.
        logits: of each.
    """

    def __init__(
        self,
        kind: type[PreTrainedModel],
        config: PreTrainedConfig,
        prompts: Sequence[Mapping[str, Any]],
        like: PreTrainedModel | None = None,
    ) -> None:
        self.kind, self.config = kind, config
        self.model = rebuilt(kind, config, like=like)
        self.prompts, self.logits = [], []
        for prompt in prompts:
            try:
                logits = _logits(self.model, prompt)
            except Exception:
                if not self.prompts:
                    raise
                continue  # of a video, which this model takes otherwise or not at all
            self.prompts.append(prompt)
            self.logits.append(logits)

    def changes(self, config: PreTrainedConfig) -> bool:
        """Whether the same weights compute something else with another configuration, or nothing."""
        try:
            other = rebuilt(self.kind, config, like=self.model)
            found = [_logits(other, prompt) for prompt in self.prompts]
        except Exception:
            return True
        return not all(_alike(a, b) for a, b in zip(self.logits, found, strict=True))

    def runs(self, values: Values) -> bool:
        """Whether it runs, on the same weights, with these settings."""
        try:
            other = rebuilt(self.kind, with_settings(self.config, values, values), like=self.model)
            return all(bool(_logits(other, prompt).isfinite().all()) for prompt in self.prompts)
        except Exception:
            return False


def _brought_near(
    first: _StandIn, ours: Values, theirs: Values, lengths: Sequence[Setting]
) -> tuple[dict[Setting, Any], dict[Setting, Any], list[Setting]]:
    """What lengths become in both, and those for which nothing smaller runs."""
    own: dict[Setting, Any] = {}
    other: dict[Setting, Any] = {}
    far = []
    large = {v for one in lengths for v in (ours.get(one), theirs.get(one)) if _is_large(v)}
    order = {value: 4 + 3 * place for place, value in enumerate(sorted(large))}
    for one in lengths:
        given = ours.get(one), theirs.get(one)
        for small in _smaller(given, order):
            tried = [
                values | ({one: new} if _is_large(old) else {})
                for values, old, new in zip((own, other), given, small, strict=True)
            ]
            if all(first.runs(values) for values in tried):
                own, other = tried
                break
        else:
            far += [one] if any(map(_is_large, given)) else []
    return own, other, far


def _smaller(given: tuple[Any, Any], order: Mapping[int, int]) -> Iterator[tuple[Any, Any]]:
    """Two lengths, ever less small: by their place among all, then as fractions; two that differ go on differing."""
    if not any(map(_is_large, given)):
        return
    yield order.get(given[0], given[0]), order.get(given[1], given[1])
    largest = max(value for value in given if _is_large(value))
    for shift in range(largest.bit_length() - 1, 0, -1):
        small = tuple(value >> shift if _is_large(value) else value for value in given)
        if 0 not in small and (small[0] == small[1]) == (given[0] == given[1]):
            yield small  # type: ignore[misc]


def _enlarging(one: Any, other: Any) -> float:
    """What makes two tiny numbers (what a norm adds to a variance) ones that show in fp32; 0 for all others."""
    if not isinstance(one, float) or not isinstance(other, float):
        return 0.0
    largest = max(abs(one), abs(other))
    return _SHOWS / largest if 0 < largest < _SHOWS else 0.0


def _is_length(setting: Setting, differs: bool) -> bool:
    name = str(setting[-1])
    return _LENGTH.search(name) is not None or (differs and _TOKEN.search(name) is None)


def _is_large(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > _REACH


@torch.no_grad()
def _logits(model: PreTrainedModel, prompt: Mapping[str, Any]) -> Float[Tensor, "batch pos vocab"]:
    return forward(model, prompt).clone()


def _alike(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _on_cpu(inputs: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in found.items()}


def _of_video(config: Any, prompt: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prompt with its image as a video of two equal frames, for models that lay both out as a grid of patches."""
    token, video = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
    if not {"pixel_values", "image_grid_thw"} <= set(prompt) or token is None or video is None:
        return []
    ids, grid = prompt["input_ids"], prompt["image_grid_thw"]
    if len(ids) != 1 or len(grid) != 1:
        return []
    image = ids[0] == token
    times = torch.where(image, 2, 1)
    changed = {
        "input_ids": torch.where(image, video, ids[0]).repeat_interleave(times)[None],
        "pixel_values_videos": torch.cat([prompt["pixel_values"]] * 2),
        "video_grid_thw": grid * torch.tensor([2, 1, 1]),
    }
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 2)):
        if name in prompt:
            row = torch.where(image, value, prompt[name][0])
            changed[name] = row.repeat_interleave(times)[None]
    return [changed]


def _reader(config: PreTrainedConfig, setting: Setting) -> tuple[type, str]:
    """The class of the configuration that a setting belongs to, and its name there (of a table: the table's)."""
    holder = config
    for place, part in enumerate(setting[:-1]):
        inner = getattr(holder, part, None)
        if not isinstance(inner, PreTrainedConfig):
            return type(holder), setting[place]
        holder = inner
    return type(holder), setting[-1]


@contextmanager
def _reads() -> Iterator[set[tuple[type, str]]]:
    """The class and the name of every setting that is read inside."""
    seen: set[tuple[type, str]] = set()
    own = PreTrainedConfig.__getattribute__

    def watched(config: Any, name: str) -> Any:
        kind = type(config)
        seen.add((kind, kind.attribute_map.get(name, name)))
        return own(config, name)

    PreTrainedConfig.__getattribute__ = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        PreTrainedConfig.__getattribute__ = own  # type: ignore[method-assign]
