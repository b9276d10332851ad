"""Activation patching: one component's activation on some tokens, taken from a donor run.

One mechanism for two models on the same tokens (cross-model activation patching, CMAP, Prakash et al. 2402.14811)
and for one model on two prompts that differ in their images (Meng et al. 2202.05262; Zhang & Nanda 2309.16042).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooks import FrankenlensError, HookedVLM
from hooks.engine import HookContext, head_results
from hooks.errors import nearest
from interp.prompts import PromptBatch
from interp.rerun import CleanRun

POINTS = ("resid_pre", "attn_out", "mlp_out", "head", "z", "vision", "projector")
BEFORE_THE_DECODER = ("vision", "projector")

Reader = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class Component:
    """What one patch moves: the address (or hook) that names it, the hook point that carries it, and the head."""

    name: str
    point: str
    hook: str
    layer: int | None = None
    head: int | None = None


def components(vlm: HookedVLM, points: Sequence[str] = POINTS) -> list[Component]:
    """Every component of a model that the named points offer, dead ones left out.

    Args:
        vlm: the opened model.
        points: of `POINTS`. `head` is the head's result, through its own model's W_O; `z` stops before it.

    Raises:
        FrankenlensError: an unknown point.
    """
    for point in points:
        if point not in POINTS:
            raise FrankenlensError(
                f"{point!r} is no patching point; choose of {', '.join(POINTS)}. {nearest(point, POINTS)}"
            )
    found: list[Component] = []
    for point in POINTS:
        if point in points:
            found += _components_at(vlm, point)
    return [component for component in found if component.hook in vlm.hook_points]


def _components_at(vlm: HookedVLM, point: str) -> Iterator[Component]:
    if point == "projector":
        yield Component("projector", point, "projector.hook_out")
        return
    if point == "vision":
        for layer in range(len(vlm.anatomy.vision.blocks)):
            yield Component(f"vision.blocks.{layer}", point, f"vision.blocks.{layer}.hook_resid_post", layer)
        return
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        name = f"blocks.{layer}"
        if point == "resid_pre":
            yield Component(f"{name}.hook_resid_pre", point, f"{name}.hook_resid_pre", layer)
        elif point in ("attn_out", "mlp_out"):
            yield Component(f"{name}.{point[:-4]}", point, f"{name}.hook_{point}", layer)
        else:
            hook = f"{name}.attn.hook_result" if point == "head" else f"{name}.attn.hook_z"
            for head in range(block.n_heads):
                label = f"{name}.attn.head.{head}" if point == "head" else f"{hook}.{head}"
                yield Component(label, point, hook, layer, head)


def cached_names(wanted: Sequence[Component]) -> list[str]:
    """The hook points a donor run must keep; per-head results are made again from z, which is smaller."""
    return list(dict.fromkeys(c.hook.replace("hook_result", "hook_z") for c in wanted))


def donor_value(run: CleanRun, component: Component) -> Float[Tensor, "..."]:
    """The activation that a patch of `component` takes from `run`; a head's result goes through the run's own W_O."""
    value = run.cache[component.hook.replace("hook_result", "hook_z")]
    if component.head is None:
        return value
    if component.point == "z":
        return value[:, :, component.head]
    block = run.vlm.anatomy.text.blocks[component.layer or 0]
    return head_results(run.vlm.module(block.out), value)[:, :, component.head]


def replace_hook(
    component: Component, value: Float[Tensor, "..."], where: Bool[Tensor, "batch pos"] | None
) -> tuple[str, Callable[[Tensor, HookContext], Tensor]]:
    """A forward hook that writes `value` at the tokens `where` (None: everywhere) and leaves all else as it is."""

    def write(activation: Tensor, hook: HookContext) -> Tensor:
        if component.head is None:
            return value if where is None else torch.where(where[..., None], value, activation)
        new = activation.clone()
        own = activation[:, :, component.head]
        new[:, :, component.head] = value if where is None else torch.where(where[..., None], value, own)
        return new

    return component.hook, write


@dataclass(frozen=True)
class PatchBatch:
    """One batch ready for patching: where each role stands, and which other example each row may borrow from."""

    batch: PromptBatch
    reads: Bool[Tensor, "batch pos"]
    partner: Int[Tensor, " batch"]

    def where(self, role: str) -> Bool[Tensor, "batch pos"]:
        """The tokens of a role; "decision" are the positions whose next token is decided, "all" every real token."""
        if role == "decision":
            return self.reads
        if role == "all":
            return self.batch.roles >= 0
        return self.batch.mask(role)


def patch_effects(
    donor: CleanRun,
    recipient: CleanRun,
    rows: PatchBatch,
    read: Reader,
    wanted: Sequence[Component],
    roles: Sequence[str],
    other_example: bool = False,
    progress: tqdm | None = None,
) -> Float[np.ndarray, "component role batch"]:
    """metric(recipient with the donor's activation) - metric(recipient), per component, role and example.

    A role that an example does not have is NaN there, never 0. With `other_example` the activation comes from the
    donor on another example with the same role lengths (NaN where the batch holds none): the control that tells
    "the donor's value for this image" from "any value of the donor".
    """
    clean = read(recipient.logits)
    effects = np.full((len(wanted), len(roles), len(clean)), np.nan)
    for i, component in enumerate(wanted):
        early = component.point in BEFORE_THE_DECODER
        value = donor_value(donor, component)
        usable = torch.ones_like(clean, dtype=torch.bool)
        if other_example:
            value, usable = _borrowed(value, component, rows.partner, donor)
        for j, role in enumerate(roles):
            where = None if early else rows.where(role)
            present = usable if early else usable & rows.where(role).any(-1)
            if (early and role != "image") or not present.any():
                continue
            logits = recipient.rerun(
                [replace_hook(component, value, where)], None if early else component.layer
            )
            effect = torch.where(present, read(logits) - clean, torch.nan)
            effects[i, j] = effect.double().cpu().numpy()
            if progress is not None:
                progress.update()
    return effects


def _borrowed(
    value: Tensor, component: Component, partner: Int[Tensor, " batch"], donor: CleanRun
) -> tuple[Tensor, Bool[Tensor, " batch"]]:
    """The donor's value with every row replaced by its partner's; rows without a partner are not usable."""
    usable = partner >= 0
    source = torch.where(usable, partner, torch.arange(len(partner), device=partner.device))
    if component.point not in BEFORE_THE_DECODER:
        return value[source], usable
    if value.shape[0] % len(partner):
        return value, torch.zeros_like(usable)
    rows = value.unflatten(0, (len(partner), -1))
    return rows[source].flatten(0, 1), usable & _equal_images(donor, len(partner))


def _equal_images(run: CleanRun, n: int) -> Bool[Tensor, ""]:
    """Whether every row of the batch holds images of one and the same grid."""
    grid = run.inputs.get("image_grid_thw")
    if grid is None:
        return torch.tensor(True, device=run.logits.device)
    per_row = grid.reshape(n, -1) if grid.numel() % n == 0 else grid[:0]
    return (torch.tensor(len(per_row) == n) & (per_row == per_row[:1]).all()).to(run.logits.device)


def partners(batch: PromptBatch) -> Int[Tensor, " batch"]:
    """For each row the next row (cyclic) with the same role at every position; -1 where there is none."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, roles in enumerate(batch.roles.tolist()):
        groups.setdefault(tuple(roles), []).append(row)
    found = torch.full((len(batch.roles),), -1)
    for members in groups.values():
        for here, there in zip(members, members[1:] + members[:1], strict=True):
            found[here] = there if len(members) > 1 else -1
    return found.to(batch.roles.device)
