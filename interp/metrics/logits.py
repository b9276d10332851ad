"""Logits that are made where they are read, some places at a time.

Of 32 traces of 2,000 tokens and 150,000 words all logits together are 39 GB in float32. What they are made of, the
output of the final norm, is a thousandth of that; so it is what runs leave behind, and the unembedding is applied to
the places that somebody reads, `at_once` of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM
from hooks.cache import ActivationCache
from hooks.uninterrupted import registered


@dataclass(frozen=True, eq=False)
class Logits:
    """Next-token logits of some columns of a batch.

    Attributes:
        source: what they are made of [batch column d_model]; without `unembed`, they themselves.
        columns: which columns of the batch these are, ascending.
        n_words: of the vocabulary.
        unembed: from the source to logits.
        alone: no other thread runs the model, or has other weights in it, while logits are made inside.
    """

    source: Float[Tensor, "batch column width"]
    columns: Int[Tensor, " column"]
    n_words: int
    unembed: Callable[[Tensor], Tensor] | None = None
    alone: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def made(cls, logits: Float[Tensor, "batch pos vocab"]) -> Logits:
        """Those that exist already."""
        return cls(logits, torch.arange(logits.shape[1], device=logits.device), logits.shape[-1])

    def of(self, source: Float[Tensor, "batch column width"]) -> Logits:
        """Those of another run at the same columns, made of this."""
        made = replace(self, source=source)
        if source.device == self.source.device:
            made.__dict__["_place"] = self._place
        return made

    @cached_property
    def _place(self) -> Int[Tensor, " pos"]:
        """Where each column of the batch stands in the source."""
        place = self.columns.new_full((int(self.columns[-1]) + 1,), -1)
        place[self.columns] = torch.arange(len(self.columns), device=place.device)
        return place.to(self.source.device)

    def at(self, rows: Int[Tensor, " place"], columns: Int[Tensor, " place"]) -> Float[Tensor, "place vocab"]:
        """Of single places, in float32; `columns` are the batch's."""
        device = self.source.device
        some = self.source[rows.to(device), self._place[columns.to(device)]]
        return (some if self.unembed is None else self.unembed(some)).float()

    def tensor(self) -> Float[Tensor, "batch column vocab"]:
        """All of them, as the model makes them."""
        return self.source if self.unembed is None else self.unembed(self.source)

    def equal(self, other: Logits) -> bool:
        """Whether they are made of the same, bit for bit."""
        return torch.equal(self.source, other.source)


class _Read:
    """The columns that are wanted of a forward: what the unembedding is given is kept, and it is given the last alone.

    Where the model's readout is not known the forward itself makes the logits, of these columns if it can.
    """

    def __init__(
        self, vlm: HookedVLM, inputs: Mapping[str, Any], columns: Int[Tensor, " column"] | None
    ) -> None:
        self._vlm, self._shape = vlm, inputs["input_ids"].shape
        every = torch.arange(self._shape[1])
        self._columns = (every if columns is None else columns).to(vlm.device)
        self._known = vlm.can("lens")
        self._given: list[Tensor] = []
        self.extra: dict[str, Any] = {}
        if not self._known and keeps_some(vlm):
            self.extra["logits_to_keep"] = self._columns

    def on(self) -> AbstractContextManager[None]:
        if not self._known:
            return nullcontext()
        unembed = self._vlm.module(self._vlm.anatomy.unembed)
        return registered(partial(unembed.register_forward_pre_hook, self._keep))

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:2] != self._shape:
            return None
        self._given.append(args[0])
        return args[0][:, -1:], *args[1:]

    def logits(self, output: Any) -> Logits:
        if len(self._given) == 1:
            (normed,) = self._given
            return unmade(self._vlm, normed[:, self._columns.to(normed.device)], self._columns)
        if self._given:
            raise FrankenlensError(
                f"{type(self._vlm.model).__name__} runs its unembedding {len(self._given)} times in one forward "
                "pass, so it is not known which of them the logits are of."
            )
        logits = output.logits if self.extra else output.logits[:, self._columns].clone()
        return Logits(logits, self._columns, logits.shape[-1])


def run_for_logits(
    vlm: HookedVLM, inputs: Mapping[str, Any], columns: Int[Tensor, " column"] | None = None
) -> Logits:
    """One forward, and the logits of some columns (None: of all); they carry gradients where these are on.

    Args:
        vlm: the opened model.
        inputs: processor tensors.
        columns: of the batch, ascending; on any device.
    """
    read = _Read(vlm, inputs, columns)
    with vlm.exclusive("reading logits"), read.on():
        return read.logits(vlm(inputs, use_cache=False, **read.extra))


@torch.no_grad()
def run_with_cache_for_logits(
    vlm: HookedVLM,
    inputs: Mapping[str, Any],
    names: Iterable[str],
    columns: Int[Tensor, " column"] | None = None,
) -> tuple[Logits, ActivationCache]:
    """`run_for_logits`, and the activations named."""
    read = _Read(vlm, inputs, columns)
    with vlm.exclusive("reading logits"), read.on():
        output, cache = vlm.run_with_cache(inputs, list(names), use_cache=False, **read.extra)
    return read.logits(output), cache


@contextmanager
def sparing_logits(vlm: HookedVLM, column: int = -1) -> Iterator[dict[str, Any]]:
    """Forward passes inside are run for their activations: they make the logits of one column alone, if that can be.

    Args:
        vlm: the opened model.
        column: of the batch.

    Yields:
        What the model is to be called with, beside its inputs.
    """
    if not vlm.can("lens"):
        one = 1 if column == -1 else torch.tensor([column], device=vlm.device)
        yield {"logits_to_keep": one} if keeps_some(vlm) else {}
        return

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0][:, [column]], *args[1:]) if args and args[0].ndim == 3 else None

    unembed = vlm.module(vlm.anatomy.unembed)
    with (
        vlm.exclusive("running for activations"),
        registered(partial(unembed.register_forward_pre_hook, cut)),
    ):
        yield {}


def unmade(
    vlm: HookedVLM, normed: Float[Tensor, "batch column d_model"], columns: Int[Tensor, " column"]
) -> Logits:
    """Of what the final norm gives out at these columns."""
    return Logits(normed, columns, vlm.n_logits, vlm.unembed, partial(vlm.exclusive, "reading logits"))


def keeps_some(vlm: HookedVLM) -> bool:
    """Whether the model's forward takes `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(vlm.model.forward).parameters


def chunks(n: int, size: int) -> Iterator[slice]:
    """0 to n, `size` at a time."""
    return (slice(first, min(first + size, n)) for first in range(0, n, size))
