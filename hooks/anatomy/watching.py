"""Watching a forward pass: what goes into every module and out of it, in which order, and every call of attention.

Nothing is changed: hooks only look, and attention functions are wrapped, for the length of the context, where
transformers hands them out (`AttentionInterface.get_interface`), so the logits are bit for bit the bare model's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from hooks.errors import FrankenlensError


@dataclass
class Call:
    """One call of one module: times of start and end (counted in events), its first floating tensor in, its outputs."""

    path: str
    started: int
    ended: int = -1
    key: str | None = None
    given: Tensor | None = None
    made: Mapping[str | None, Tensor] = field(default_factory=dict)
    arguments: tuple[tuple, dict[str, Any]] | None = None

    @property
    def out(self) -> Tensor | None:
        """The output, or its first floating tensor."""
        return next(iter(self.made.values()), None)


@dataclass
class Attended:
    """One call of the attention interface."""

    module: nn.Module
    time: int
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


@dataclass
class Record:
    """What was seen: calls in the order in which they started, and attention calls; nothing while it is `paused`."""

    calls: list[Call] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    time: int = 0
    paused: bool = False

    def tick(self) -> int:
        """The next moment."""
        self.time += 1
        return self.time


def first_floating(args: tuple, kwargs: Mapping[str, Any]) -> tuple[str | None, Tensor | None]:
    """The first floating tensor of at least two axes among positional arguments, then keywords; and the keyword."""
    for value in args:
        if is_stream(value):
            return None, value
    named = {name: value for name, value in kwargs.items() if is_stream(value)}
    for name in ("hidden_states", "hidden_state", "inputs_embeds", "x"):
        if name in named:
            return name, named[name]
    return next(iter(named.items()), (None, None))


def is_stream(value: Any) -> bool:
    """Whether it is a tensor of numbers with at least two axes."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def floating_parts(output: Any) -> dict[str | None, Tensor]:
    """The floating tensors of an output: itself (None), the first of a tuple (None), or fields by name."""
    found: dict[str | None, Tensor] = {}
    if isinstance(output, Mapping):
        for name, held in output.items():
            value = held[0] if isinstance(held, tuple | list) and len(held) == 1 else held
            if isinstance(value, Tensor) and is_stream(value):
                found[str(name)] = value
        return found
    for value in output if isinstance(output, tuple | list) else (output,):
        if isinstance(value, Tensor) and is_stream(value):
            return {None: value}
    return found


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether processor tensors hold an image."""
    return any(map(of_an_image, inputs))


def of_an_image(name: str) -> bool:
    """Whether a processor calls an image's tensor so."""
    return "pixel" in name or "patches" in name


@contextmanager
def watched(
    model: nn.Module,
    paths: Iterable[str],
    record: Record,
    *,
    keep: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]] | None = None,
    arguments: frozenset[str] = frozenset(),
    ended: Callable[[Call], None] | None = None,
) -> Iterator[Record]:
    """Look at modules while the model runs.

    Args:
        model: the model.
        paths: modules to look at.
        record: what is seen goes here.
        keep: what is kept of a tensor; by default its shape alone.
        arguments: modules whose whole arguments are kept, for calling them again.
        ended: called at the end of each call.
    """
    kept = keep or shape_of
    handles = []
    open_calls: dict[str, list[Call]] = {}

    def before(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if record.paused:
            return
        call = Call(path, record.tick())
        call.key, given = first_floating(args, kwargs)
        call.given = None if given is None else kept(given)
        if path in arguments:
            call.arguments = with_own_caches(args, kwargs)
        record.calls.append(call)
        open_calls.setdefault(path, []).append(call)

    def after(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if record.paused:
            return
        call = open_calls[path].pop()
        call.ended = record.tick()
        call.made = {name: kept(value) for name, value in floating_parts(output).items()}
        if ended is not None:
            ended(call)

    try:
        for path in paths:
            module = model.get_submodule(path)

            def first(m, args, kwargs, path=path):
                before(path, m, args, kwargs)

            def last(m, args, kwargs, output, path=path):
                after(path, m, args, kwargs, output)

            handles.append(module.register_forward_pre_hook(first, with_kwargs=True))
            handles.append(module.register_forward_hook(last, with_kwargs=True))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def shape_of(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The tensor without its numbers."""
    return torch.empty_like(tensor, device="meta")


def copied(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A copy that no later edit in place reaches."""
    return tensor.detach().clone()


def with_own_caches(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with copies of what it adds its keys and values to, or takes earlier ones from."""

    def own(value: Any) -> Any:
        return copy.deepcopy(value) if isinstance(value, Cache) else value

    return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}


_LOCK = threading.RLock()


@contextmanager
def attention_watched(record: Record) -> Iterator[None]:
    """Record every call of an attention function that transformers hands out meanwhile, in this thread."""

    def looked_at(
        function: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
    ):
        result = function(module, query, key, value, *args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        if not record.paused:
            record.attended.append(Attended(module, record.tick(), query, key, value, copied(out)))
        return result

    with attention_called_by(looked_at):
        yield


@contextmanager
def attention_called_by(caller: Callable[..., Any]) -> Iterator[None]:
    """For the length of the context, `caller` is given each attention function with what it is called with.

    Args:
        caller: is handed the function that transformers hands out in this thread, then the arguments of its call
            (module, query, key, value, ...); returns what the function would.
    """
    own = threading.get_ident()
    with _LOCK:
        original = AttentionInterface.get_interface

        def get_interface(self: AttentionInterface, implementation: str, default: Callable) -> Callable:
            function = original(self, implementation, default)
            return partial(caller, function) if threading.get_ident() == own else function

        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
        try:
            yield
        finally:
            AttentionInterface.get_interface = original  # type: ignore[method-assign]


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos vocab"]:
    """One forward without gradients or cache; its logits.

    Raises:
        FrankenlensError: the model does not run on these inputs, or has no logits.
    """
    with torch.no_grad():
        return forward(model, inputs)


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos vocab"]:
    """One forward without a cache; its logits.

    Raises:
        FrankenlensError: the model returns none.
    """
    output = model(**inputs, use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise FrankenlensError(f"{type(model).__name__} returns no logits, so it is no language model.")
    return logits
