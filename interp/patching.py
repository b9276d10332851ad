"""Activation patching: one component's activation on some tokens, taken from a donor run.

One mechanism for two models on the same tokens (cross-model activation patching, CMAP, Prakash et al. 2402.14811)
and for one model on two prompts that differ in their images (Meng et al. 2202.05262; Zhang & Nanda 2309.16042).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from hooks.errors import nearest
from interp.prompts import Prompt, PromptBatch

POINTS = ("resid_pre", "attn_out", "mlp_out", "head", "z", "vision", "projector")
BEFORE_THE_DECODER = ("vision", "projector")


@dataclass(frozen=True)
class Component:
    """What one patch moves: the address (or hook) that names it, the hook points that carry it, and the head.

    Only the projector of a DeepStack model has several: what it adds in the decoder is as much its output.
    """

    name: str
    point: str
    hooks: tuple[str, ...]
    layer: int | None = None
    head: int | None = None

    @property
    def hook(self) -> str:
        """The hook point of a component that has one."""
        return self.hooks[0]


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
        deepstack = (name for name in vlm.hook_points if name.endswith("hook_deepstack"))
        yield Component("projector", point, ("projector.hook_out", *deepstack))
        return
    if point == "vision":
        for layer in range(len(vlm.anatomy.vision.blocks)):
            yield Component(
                f"vision.blocks.{layer}", point, (f"vision.blocks.{layer}.hook_resid_post",), layer
            )
        return
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        name = f"blocks.{layer}"
        if point == "resid_pre":
            yield Component(f"{name}.hook_resid_pre", point, (f"{name}.hook_resid_pre",), layer)
        elif point in ("attn_out", "mlp_out"):
            yield Component(f"{name}.{point[:-4]}", point, (f"{name}.hook_{point}",), layer)
        else:
            hook = f"{name}.attn.hook_result" if point == "head" else f"{name}.attn.hook_z"
            for head in range(block.n_heads):
                label = f"{name}.attn.head.{head}" if point == "head" else f"{hook}.{head}"
                yield Component(label, point, (hook,), layer, head)


def cached_names(wanted: Sequence[Component]) -> list[str]:
    """The hook points a donor run must keep; per-head results are made again from z, which is smaller."""
    return list(dict.fromkeys(name.replace("hook_result", "hook_z") for c in wanted for name in c.hooks))


@dataclass(frozen=True)
class PatchBatch:
    """One batch ready for patching: where each role stands, and which other example each row may borrow from."""

    batch: PromptBatch
    reads: Bool[Tensor, "batch pos"]
    partner: Int[Tensor, " batch"]

    def where(self, role: str) -> Bool[Tensor, "batch pos"]:
        """The tokens of a role; "decision" are the positions whose next token is decided, "all" every real token."""
        return self.reads if role == "decision" else self.batch.mask(role)


def borrowed(value: Float[Tensor, "..."], early: bool, rows: PatchBatch) -> Float[Tensor, "..."]:
    """A donor's value with every row's part replaced by its partner's; rows without one keep their own."""
    source = [own if other < 0 else other for own, other in enumerate(rows.partner.tolist())]
    if not early:
        return value[source]
    # Images of all rows follow one another along the first axis: patches, image tokens, or whole images.
    sizes = [image_size(prompt) for prompt in rows.batch.prompts]
    if any(size * value.shape[0] % sum(sizes) for size in sizes):
        raise FrankenlensError(
            f"{value.shape[0]} rows of the vision side do not divide over images of sizes {sizes}."
        )
    pieces = value.split([size * value.shape[0] // sum(sizes) for size in sizes])
    return torch.cat([pieces[row] for row in source])


def image_size(prompt: Prompt) -> int:
    """How much of the vision side's first axis a prompt takes: its patches where they are packed, else its images."""
    if "image_grid_thw" in prompt.inputs:
        return int(prompt.inputs["image_grid_thw"].prod(-1).sum())
    pixels = prompt.inputs.get("pixel_values")
    return 0 if pixels is None else pixels.flatten(0, -4).shape[0]


def image_shapes(prompt: Prompt) -> tuple[int, ...]:
    """What must be equal for two prompts' images to correspond patch by patch."""
    for name in ("image_grid_thw", "pixel_values"):
        if name in prompt.inputs:
            tensor = prompt.inputs[name]
            return tuple(tensor.flatten().tolist()) if name == "image_grid_thw" else tuple(tensor.shape)
    return ()


def partners(batch: PromptBatch) -> Int[Tensor, " batch"]:
    """For each row the next row (cyclic) with the same role at every position and images of the same size; else -1."""
    groups: dict[tuple, list[int]] = {}
    for row, prompt in enumerate(batch.prompts):
        groups.setdefault((prompt.roles, image_shapes(prompt)), []).append(row)
    found = torch.full((len(batch),), -1)
    for members in groups.values():
        for here, there in zip(members, members[1:] + members[:1], strict=True):
            found[here] = there if len(members) > 1 else -1
    return found.to(batch.roles.device)
