"""What the parts of `hooks` ask of an opened model, so that none of them has to know the class that has it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from hooks.anatomy import Anatomy
from hooks.engine import Hook
from hooks.points import HookPoint


@runtime_checkable
class Opened(Protocol):
    """A model with named hook points; `hooks.vlm.HookedVLM` is one."""

    model: Any
    processor: Any
    anatomy: Anatomy
    hook_points: dict[str, HookPoint]
    absent: dict[str, str]

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        ...

    @property
    def n_layers(self) -> int:
        """Decoder blocks."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the decoder's residual stream."""
        ...

    @property
    def n_logits(self) -> int:
        """Token ids that there are logits for."""
        ...

    def module(self, path: str) -> nn.Module:
        """The module at a path of the anatomy."""
        ...

    def hooks(self, fwd_hooks: Sequence[tuple[Any, Any]] = ()) -> AbstractContextManager[Any]:
        """Keep hook functions on for the length of a context."""
        ...

    def attached(self, layer: list[Hook]) -> AbstractContextManager[None]:
        """Keep hooks on that are made already."""
        ...

    def require_open(self) -> None:
        """Raise if the model was closed."""
        ...
