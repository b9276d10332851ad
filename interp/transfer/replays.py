"""What models with some weights in common need not compute again on a batch: features of its images, and the prefill up
to a block. It is the model's own modules that give out once more what they gave out; all others run as they always do.

Nothing is taken for granted of an architecture. `proved` holds logits of the very model, taken up at every block that
is asked for, against its own, bit for bit; and where the first block is not given the same stream and the same masks
and positions as when it was recorded, nothing is replayed but an error raised (`Unsupported`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from hooks import HookedVLM
from hooks.anatomy.structure import structure_of
from hooks.anatomy.watching import first_floating
from hooks.errors import one_line
from hooks.replaced import Forward, replaced
from interp.pair.generation import plain_greedy
from interp.sweep.rerun import NOT_CALLED_AGAIN
from interp.transfer.kept import blank, copied, mapped, n_bytes, same
from interp.transfer.prefixes import BLOCKS, EMBED, Step

PROOF_STEPS = 3
"""Of generation: the keys and values are used in all but the first."""
_IN_PASSING = ("last_hidden_state", "hidden_states", "attentions")
"""What a projector's output holds beside the features, which nobody reads."""


class Unsupported(Exception):
    """Why a model cannot be taken up behind some of its blocks; it then runs as a whole, and that is said."""


class Replays:
    """What is kept of one batch, for the runs that share it.

    Args:
        vlm: the model whose weights are changed between runs.
        spare: bytes that may be kept; None: any number.

    Attributes:
        lacked: whether there was no room for something.
    """

    def __init__(self, vlm: HookedVLM, spare: int | None = None) -> None:
        self._vlm, self._spare, self.lacked = vlm, spare, False
        self._blocks = vlm.anatomy.text.blocks
        self._roots = roots(vlm)
        self.clear()

    def clear(self) -> None:
        """Keep nothing."""
        self._front: dict[str, list[Any]] | None = None
        self._given: Any = None  # to the first block
        self._layers: dict[int, Any] = {}  # of the cache, as they are behind their block
        self._streams: dict[int, tuple[Tensor, Any]] = {}  # by the blocks before them

    @property
    def n_bytes(self) -> int:
        """Of what is kept."""
        return sum(map(n_bytes, (self._front, self._given, self._layers, self._streams)))

    @property
    def start(self) -> int:
        """Blocks that are not run."""
        return max(self._streams, default=0)

    @contextmanager
    def running(self, step: Step) -> Iterator[None]:
        """Inside, the model generates once, on the batch: it takes what is there, and leaves what the step says.

        Raises:
            Unsupported: it does something that is not known here; nothing is kept then.
        """
        self._forget(step.common)
        forwards: dict[str, Forward] = {}
        if self._front is not None:
            forwards = {path: partial(self._again, iter(calls)) for path, calls in self._front.items()}
        elif step.keeps_front:
            front: dict[str, list[Any]] = {path: [] for path in self._roots}
            forwards = {path: partial(self._noted, path, calls) for path, calls in front.items()}
        start, end = self.start, max(step.levels, default=0)
        blocks = {
            self._blocks[layer].path: partial(self._skipped, layer, start)
            if layer < start
            else partial(self._recorded, layer, step.levels)
            for layer in range(max(start, end))
        }
        try:
            with (
                self._vlm.exclusive("variants that write together"),
                replaced(self._vlm.model, forwards),
                replaced(self._vlm.model, blocks, once=True),
            ):
                yield
        except BaseException:
            self.clear()
            raise
        if self._front is None and step.keeps_front:
            self._front = front if self._fits(front) else None
        self._forget(BLOCKS + max(self._streams, default=0))

    def _forget(self, common: int) -> None:
        """Keep only what is of the first `common` stages."""
        self._front = self._front if common else None
        self._streams = {k: kept for k, kept in self._streams.items() if k <= common - BLOCKS}
        self._layers = {layer: kept for layer, kept in self._layers.items() if layer < self.start}
        self._given = self._given if self._streams and common > EMBED else None

    def _fits(self, more: Any) -> bool:
        fits = self._spare is None or self.n_bytes + n_bytes(more) <= self._spare
        self.lacked |= not fits
        return fits

    def _noted(
        self, path: str, calls: list[Any], own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """A call of the front, whose output is kept; of what only leads to the projector, its shape alone."""
        out = own(*args, **kwargs)
        key = self._vlm.anatomy.projector_key
        if path != self._vlm.anatomy.projector and self._vlm.anatomy.projector:
            calls.append(mapped(out, blank))
        elif isinstance(out, Mapping) and key is not None:
            unread = [name for name in _IN_PASSING if name in out and name != key]
            fields = {k: mapped(v, blank if k in unread else torch.clone) for k, v in out.items()}
            calls.append(type(out)(**fields))
        else:
            calls.append(mapped(out, torch.clone))
        return out

    def _again(
        self, calls: Iterator[Any], own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        for found in calls:
            return mapped(found, copied)
        raise Unsupported("its vision side runs more often than it did on the same images")

    def _recorded(
        self,
        layer: int,
        levels: Collection[int],
        own: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """A block that runs: what it leaves in the cache is kept, and the stream behind it where that is asked for."""
        if layer == 0:
            given = _given(args, kwargs)
            self._given = given if self._fits(given) else None
        cache = _cache_of(args, kwargs)
        out = own(*args, **kwargs)
        if not hasattr(cache, "layers") or layer >= len(cache.layers):
            raise Unsupported("its cache does not have a layer for every block")
        stream, rest = _taken_apart(out)
        behind_all = self._given is not None and all(before in self._layers for before in range(layer))
        if behind_all and self._fits(cache.layers[layer]):
            self._layers[layer] = _copied(cache.layers[layer])
            if layer + 1 in levels and self._fits(stream):
                self._streams[layer + 1] = stream.clone(), rest
        return out

    def _skipped(
        self, layer: int, start: int, own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """A block that does not run; the last of them gives out the stream that it gave out."""
        if layer == 0 and not same(self._given, _given(args, kwargs)):
            raise Unsupported(
                "its first block is not given what it was given with the same weights before it"
            )
        cache = _cache_of(args, kwargs)
        kept = _copied(self._layers[layer])
        if layer == len(cache.layers):
            cache.layers.append(kept)
        else:
            cache.layers[layer] = kept
        _, stream = first_floating(args, kwargs)
        out, rest = self._streams[start]
        given = out.clone() if layer == start - 1 else stream
        return given if rest is None else (given, *rest)


def roots(vlm: HookedVLM) -> tuple[str, ...]:
    """The outermost modules of the vision side."""
    paths = [path for path in (vlm.anatomy.vision.path, vlm.anatomy.projector) if path]
    paths = paths if vlm.anatomy.vision.blocks else []
    return tuple(dict.fromkeys(p for p in paths if not any(p.startswith(f"{other}.") for other in paths)))


@torch.no_grad()
def proved(vlm: HookedVLM, inputs: Mapping[str, Any], levels: Collection[int], front: bool) -> str:
    """Why a model cannot be taken up behind so many blocks; "" where it can, and its logits are the same bit for bit.

    Args:
        vlm: the opened model, with any weights.
        inputs: a prompt or a few, small ones, with what others have: images.
        levels: blocks that are not to be run on prompts.
        front: whether features of images are to be used again.
    """
    if reason := _refused(vlm):
        return reason
    kept = Replays(vlm)
    try:
        with kept.running(Step("", 0, front, tuple(levels))):
            whole = _logits(vlm, inputs)
        for level in sorted(levels, reverse=True) or [0]:
            with kept.running(Step("", BLOCKS + level, False, ())):
                again = _logits(vlm, inputs)
            if not same(whole, again):
                return f"taken up behind {level} blocks, it gives other logits"
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except Unsupported as error:
        return str(error)
    except NOT_CALLED_AGAIN as error:
        return f"{type(error).__name__}: {one_line(error, 120)}"
    return ""


def _refused(vlm: HookedVLM) -> str:
    """What rules it out before anything is tried."""
    blocks = [block.path for block in vlm.anatomy.text.blocks]
    if structure_of(vlm.model, {}, False) is None:
        return "hooks stand on its modules, or forwards that are not their own"
    if vlm.model.training:
        return "it is in training mode"
    if getattr(vlm.model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if vlm.anatomy.text.ndim != 3 or not blocks or len(set(blocks)) < len(blocks):
        return "its decoder is not one stream through blocks that run once each"
    return ""


def _logits(vlm: HookedVLM, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Of the first steps after a prompt."""
    with plain_greedy(vlm.model, (), 0):
        made = vlm.generate(
            inputs, max_new_tokens=PROOF_STEPS, return_dict_in_generate=True, output_logits=True
        )
    return [*made.logits, made.sequences]


def _cache_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    found = next((one for one in (*kwargs.values(), *args) if isinstance(one, Cache)), None)
    if found is None or not isinstance(getattr(found, "layers", None), list):
        raise Unsupported("its blocks are handed no cache of layers")
    return found


def _copied(layer: Any) -> Any:
    """A layer of a cache that changes no more; one that is only ever put longer tensors in shares those that it has."""
    return copy.copy(layer) if type(layer) is DynamicLayer else copy.deepcopy(layer)


def _given(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that a block is given; of the stream, which it may write to, a copy."""
    each = {**{str(at): one for at, one in enumerate(args)}, **kwargs}
    _, stream = first_floating(args, kwargs)
    return {
        name: one.clone() if isinstance(one, Tensor) and one is stream else one
        for name, one in each.items()
        if _is_plain(one)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, Tensor)


def _taken_apart(out: Any) -> tuple[Tensor, Any]:
    """The stream of what a block gives out, and what stands behind it (None where it is the stream alone)."""
    if isinstance(out, Tensor):
        return out, None
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        if any(one is not None for one in out[1:]):
            raise Unsupported("its blocks give out more than the stream")
        return out[0], out[1:]
    raise Unsupported(f"its blocks give out a {type(out).__name__}")
