"""A tiny model and a donor of other weights, opened, with two prompts and a metric: what analyses are tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import HookedVLM
from interp.metrics import LogitDifference
from interp.prompts import Prompt, PromptBatch, collate
from tests.architectures import ARCHITECTURES, TinyModel, build
from tests.architectures.inputs import BEFORE
from tests.architectures.shrink import FIRST_MARK, IMAGE
from tests.architectures.table import plain
from tests.architectures.table.cells import finite, within

Change = Callable[[Tensor, Any], Tensor]
SHAKES = 3
"""How often rounding is tried."""


class Bench:
    """Recipient, donor, prompts.

    Attributes:
        name: the architecture.
        vlm, donor: opened on the recipient's prompt.
        tiny: the recipient as it was built.
    """

    def __init__(self, name: str, tiny: TinyModel, vlm: HookedVLM) -> None:
        self.name, self.tiny, self.vlm = name, tiny, vlm

    @cached_property
    def donor(self) -> HookedVLM:
        """The same architecture with other weights."""
        return HookedVLM(build(self.name, seed=1).model, inputs=self.tiny.inputs)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The tiny model's prompt, and one with other words and another image."""
        inputs, pixels = dict(self.tiny.inputs), ARCHITECTURES[self.name].pixels
        if "input_ids" not in inputs:
            return [Prompt.from_inputs(inputs, self._roles)]  # refused
        other = dict(inputs)
        generator = torch.Generator().manual_seed(1)
        ids = inputs["input_ids"].clone()
        ids[:, 1 : BEFORE - 1] = torch.randint(3, FIRST_MARK, (1, BEFORE - 2), generator=generator)
        ids[:, -8:-1] = torch.randint(3, FIRST_MARK, (1, 7), generator=generator)
        other["input_ids"] = ids
        if pixels is not None and inputs[pixels].is_floating_point():
            noise = torch.randn(inputs[pixels].shape, generator=generator)
            changed = inputs[pixels] + 0.5 * noise
            if name_of_places(inputs[pixels]):
                changed[..., :2] = inputs[pixels][..., :2]
            other[pixels] = changed
        token = self.vlm.image_token_id
        return [
            Prompt.from_inputs(one, self._roles, image_token_id=token, name=f"prompt {n}")
            for n, one in enumerate((inputs, other))
        ]

    @property
    def _roles(self) -> tuple[str, ...]:
        if "input_ids" not in self.tiny.inputs:
            return ("question",)
        ids = self.tiny.inputs["input_ids"][0].tolist()
        roles = ["template"] * BEFORE + ["question"] * (len(ids) - BEFORE)
        return tuple("image" if token == IMAGE else role for token, role in zip(ids, roles, strict=True))

    @cached_property
    def batch(self) -> PromptBatch:
        """Both prompts."""
        return collate(self.prompts)

    @cached_property
    def inputs(self) -> Mapping[str, Tensor]:
        """Both prompts as tensors; of a model that is given no tokens, what it is given."""
        return self.batch.inputs if "input_ids" in self.tiny.inputs else self.tiny.inputs

    @cached_property
    def clean(self) -> Float[Tensor, "batch pos vocab"]:
        """Logits of both prompts, of the bare model."""
        return plain.logits_of(self.vlm.model, self.inputs)

    @cached_property
    def metric(self) -> LogitDifference:
        """The likeliest word of the first prompt over one in the middle."""
        last = self.clean[0, -1]
        words = torch.where(finite(last), last, -torch.inf).argsort(descending=True).tolist()
        a, b = words[0], words[int(finite(last).sum()) // 2]
        return LogitDifference(torch.tensor([a, a]), torch.tensor([b, b]))

    def measured(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[np.ndarray, " example"]:
        """The metric, taken here."""
        rows = logits[:, -1].double()
        return (rows[:, int(self.metric.a[0])] - rows[:, int(self.metric.b[0])]).numpy()

    def where(self, place: str | int) -> Bool[Tensor, " pos"]:
        """The tokens of a role, counted here."""
        roles = self._roles
        if isinstance(place, int):
            return torch.arange(len(roles)) == place
        if place == "decision":
            return torch.arange(len(roles)) == len(roles) - 1
        return torch.tensor([place in ("all", role) for role in roles])

    @torch.no_grad()
    def full(self, hooks: Sequence[tuple[str, Change]]) -> Float[Tensor, "batch pos vocab"]:
        """Logits of one full forward pass of both prompts, with changes at hook points."""
        return self.vlm.run_with_hooks(self.inputs, list(hooks), use_cache=False).logits

    def off(
        self,
        ours: Float[np.ndarray, " example"],
        theirs: Float[np.ndarray, " example"],
        hooks: Sequence[tuple[str, Change]] = (),
    ) -> float:
        """How far metrics differ, in units of what is allowed: 1e-5 x max(1, largest logit), or its rounding."""
        scale = max(1.0, self.clean[finite(self.clean)].abs().max().item())
        apart = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max()) / (1e-5 * scale)
        return apart if apart <= 1.0 else apart / max(1.0, self.rounding(hooks, scale))

    def rounding(self, hooks: Sequence[tuple[str, Change]], scale: float) -> float:
        """How far the metric moves, at most, when every block's input is off by a step of its rounding; four times."""
        streams = [name for name in self.vlm.hook_points if name.endswith("hook_resid_pre")]
        before = self.measured(self.full(hooks))
        moved = []
        for seed in range(SHAKES):
            shake = shaken(torch.Generator().manual_seed(seed))
            after = self.measured(self.full([*((name, shake) for name in streams), *hooks]))
            moved.append(float(np.abs(after - before).max()))
        return 4 * max(moved) / (1e-5 * scale)


def shaken(generator: torch.Generator) -> Change:
    """Every number off by one step of its rounding, up or down."""

    def shake(value: Tensor, hook: Any) -> Tensor:
        signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
        return value * (1 + signs * torch.finfo(value.dtype).eps)

    return shake


def name_of_places(pixels: Tensor) -> bool:
    """Whether patches begin with their row and column, whole numbers that are no colour."""
    head = pixels[..., :2]
    return pixels.ndim == 3 and bool((head == head.round()).all()) and bool((head > 0).any())


def masked(here: Bool[Tensor, " pos"], new: Change, axis: int) -> Change:
    """A change at some tokens only."""

    def change(value: Tensor, hook: Any) -> Tensor:
        shape = [1] * value.ndim
        shape[axis] = len(here)
        return torch.where(here.reshape(shape), new(value, hook).to(value), value)

    return change


def worst(numbers: Mapping[str, float]) -> tuple[str, float]:
    """The largest difference, and what it is of."""
    name = max(numbers, key=lambda n: (np.isnan(numbers[n]), numbers[n]))
    return name, numbers[name]


def largest(logits: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> float:
    """`within` of the words that are not ruled out."""
    keep = finite(other)
    return within(logits[keep], other[keep])
