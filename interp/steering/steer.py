"""A direction added to the activations of a site while a model generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooks import FrankenlensError, HookContext, HookedVLM
from hooks.vlm import FwdHooks
from interp.lockstep.intervention import Intervention
from interp.lockstep.moved import EVERYWHERE, Moved, require_roles
from interp.lockstep.places import Places
from interp.lockstep.refusals import require_fits
from interp.lockstep.run import Run, Written, write_all
from interp.lockstep.sampling import Chooser, Sampling
from interp.prompts import Prompt, PromptBatch
from interp.results.store import Store
from interp.steering.directions import Direction, require_site

HOOKED = ("prefill", "generated", "image", "question")


@dataclass(frozen=True, eq=False)
class Steering:
    """A direction, how much of it, and at which tokens (`interp.lockstep.WHEN`, as in `Moved`).

    Raises:
        FrankenlensError: tokens that do not exist.
    """

    direction: Direction
    coefficient: float
    when: tuple[str, ...] = EVERYWHERE
    from_divergence: bool = False

    def __post_init__(self) -> None:
        Moved(self.direction.site, self.when)
        if self.from_divergence:
            raise FrankenlensError("steering has no donor to diverge from: from_divergence=False")


@torch.no_grad()
def steer(
    vlm: HookedVLM,
    prompts: Sequence[Prompt],
    steering: Steering | Sequence[Steering],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    progress: bool = False,
    keep: Store | None = None,
) -> list[Written]:
    """What a model writes with directions added; the roles of what is written are followed as it is.

    Args:
        vlm: the model.
        prompts: from one builder.
        steering: what is added where; several add up.
        max_new_tokens, sampling, batch_size, progress, keep: as in `interp.lockstep.lockstep`.

    Raises:
        FrankenlensError: before anything runs: a site or a role that does not exist, a direction of another size, or a
            prompt that does not fit the context.
    """
    steering = [steering] if isinstance(steering, Steering) else list(steering)
    for one in steering:
        _require_size(vlm, one.direction)
    require_roles([Moved(one.direction.site, one.when) for one in steering], prompts)
    require_fits(vlm, prompts, max_new_tokens)

    def start(batch: PromptBatch, chooser: Chooser, rows: Sequence[int]) -> Run:
        places = Places(batch, steering)
        return Run(vlm, None, batch, _Adding(steering, places), places, chooser, rows)

    bar = "steer" if progress else ""
    return write_all((vlm,), prompts, start, max_new_tokens, sampling, batch_size, bar, keep)


def steer_hooks(
    direction: Direction, coefficient: float, batch: PromptBatch, when: tuple[str, ...] = EVERYWHERE
) -> FwdHooks:
    """The same as hooks, for `HookedVLM.generate` or `interp.pair.generation.greedy_batch` on `batch`.

    Args:
        direction, coefficient: what is added.
        batch: what is generated from.
        when: of prefill, generated, image and question; the roles of what is written are known to `steer` only.

    Raises:
        FrankenlensError: other tokens.
    """
    for name in when:
        if name not in HOOKED:
            raise FrankenlensError(f"steer_hooks knows {', '.join(HOOKED)}, not {name!r}; use steer")
    places = Places(batch, [Steering(direction, coefficient, when)])
    prompt, written = places.masks[0], "generated" in when

    def add(activation: Tensor, hook: HookContext) -> Tensor | None:
        prefill = activation.shape[1] == prompt.shape[1]
        here = prompt if prefill else torch.full(activation.shape[:2], written)
        return _added(activation, direction.vector, coefficient, here) if bool(here.any()) else None

    return [(direction.site, add)]


class _Adding(Intervention):
    """The intervention that adds directions."""

    def __init__(self, steering: Sequence[Steering], places: Places) -> None:
        self._places, self._writes = places, False
        self.recipient_hooks: FwdHooks = [
            (one.direction.site, self._hook(spec, one)) for spec, one in enumerate(steering)
        ]

    @contextmanager
    def writing(self) -> Iterator[None]:
        self._writes = True
        try:
            yield
        finally:
            self._writes = False

    def _hook(self, spec: int, one: Steering):
        def add(activation: Tensor, hook: HookContext) -> Tensor | None:
            if not self._writes or not self._places.somewhere[spec]:
                return None
            return _added(activation, one.direction.vector, one.coefficient, self._places.masks[spec])

        return add


def _added(
    activation: Float[Tensor, "row column ..."],
    vector: Float[Tensor, " d"],
    coefficient: float,
    here: Tensor,
) -> Float[Tensor, "row column ..."]:
    change = (coefficient * vector).to(activation).reshape(activation.shape[2:])
    mask = here.to(activation.device).reshape(*here.shape, *[1] * (activation.ndim - 2))
    return torch.where(mask, activation + change, activation)


def _require_size(vlm: HookedVLM, direction: Direction) -> None:
    require_site(vlm, direction.site)
    sizes: list[int] = []

    def see(activation: Tensor, hook: HookContext) -> None:
        sizes.append(activation[0, 0].numel())

    ids = torch.zeros(1, 1, dtype=torch.long)
    vlm.run_with_hooks({"input_ids": ids}, [(direction.site, see)], use_cache=False)
    if sizes[0] != len(direction.vector):
        raise FrankenlensError(
            f"direction {direction.name!r} has {len(direction.vector)} entries; {direction.site} has {sizes[0]}"
        )
