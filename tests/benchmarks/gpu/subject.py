"""A model that is measured, and the same interventions on it by one full forward each, with plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooks import HookedVLM
from interp.metrics import LogitDifference
from interp.prompts import Prompt, collate
from tests.benchmarks.gpu.floor import Floor


@dataclass
class Subject:
    """A model, two prompts of it, and what is known of them so far."""

    name: str
    size: str
    device: torch.device
    dtype: torch.dtype
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def vlm(self) -> HookedVLM:
        return self.given["vlm"]

    @property
    def prompts(self) -> tuple[Prompt, Prompt]:
        """What is acted on, and what activations are from."""
        return self.given["prompts"]

    @property
    def floor(self) -> Floor:
        return Floor(self.vlm, len(self.prompts[0]))

    metric = LogitDifference(torch.tensor([11]), torch.tensor([12]))


@torch.no_grad()
def with_stream(own: Subject, layer: int, token: int) -> float:
    """The metric of one full forward, the stream before a layer replaced at a token by a plain hook."""
    block = own.vlm.module(own.vlm.anatomy.text.blocks[layer].path)

    def read(module: Any, args: tuple, kwargs: dict) -> None:
        held.append((args[0] if args else kwargs["hidden_states"]).clone())

    def write(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, token] = held[0][:, token]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    held: list[Tensor] = []
    return _replaced(own, partial(block.register_forward_pre_hook, with_kwargs=True), read, write)


@torch.no_grad()
def with_head(own: Subject, layer: int, head: int) -> float:
    """The same of one head at all tokens: what W_O is given of it."""
    block = own.vlm.anatomy.text.blocks[layer]
    columns = slice(head * block.d_head, (head + 1) * block.d_head)

    def read(module: Any, args: tuple) -> None:
        held.append(args[0].clone())

    def write(module: Any, args: tuple) -> tuple:
        mixed = args[0].clone()
        mixed[..., columns] = held[0][..., columns]
        return (mixed, *args[1:])

    held: list[Tensor] = []
    return _replaced(own, own.vlm.module(block.out).register_forward_pre_hook, read, write)


def _replaced(own: Subject, register: Callable[..., Any], read: Any, write: Any) -> float:
    model: Any = own.vlm.model
    for place, hook in ((1, read), (0, write)):
        handle = register(hook)
        try:
            logits = model(**inputs_for(own, place), use_cache=False).logits
        finally:
            handle.remove()
    own.given["largest"] = float(logits[0, -1].abs().max())
    a, b = int(own.metric.a), int(own.metric.b)
    return float(logits[0, -1, a].float() - logits[0, -1, b].float())


def inputs_for(own: Subject, place: int = 0) -> dict[str, Tensor]:
    """Tensors of one of its prompts, on its device."""
    return collate(own.prompts[place : place + 1]).to(own.device).inputs
