"""How two prompts line up: whose activation a row may borrow, and when two images correspond patch by patch.

For two models on the same tokens (cross-model activation patching, CMAP, Prakash et al. 2402.14811) and for one model
on two prompts that differ in their images (Meng et al. 2202.05262; Zhang & Nanda 2309.16042).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.prompts.batch import PromptBatch, in_a_strip
from interp.prompts.prompt import Prompt


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
    pieces, axis = of_rows(value, rows.batch)
    return torch.cat([pieces[row] for row in source], dim=axis)


def of_rows(value: Float[Tensor, "..."], batch: PromptBatch) -> tuple[tuple[Tensor, ...], int]:
    """A value of the vision side cut into the parts of each row (empty where it has no image), and along which axis.

    Images of all rows follow one another: along the first axis patches, image tokens or whole images; along the second
    where the first is of size one, the patches of all images being one long row.

    Raises:
        FrankenlensError: it does not divide over the images.
    """
    sizes = [image_size(prompt) for prompt in batch.prompts]
    axis = 1 if value.ndim > 2 and value.shape[0] == 1 < sum(map(bool, sizes)) else 0
    sizes = [image_area(prompt) for prompt in batch.prompts] if axis else sizes
    length = value.shape[axis]
    if not any(sizes) or any(size * length % sum(sizes) for size in sizes):
        raise FrankenlensError(
            f"{length} rows of the vision side do not divide over images of sizes {sizes}."
        )
    return value.split([size * length // sum(sizes) for size in sizes], dim=axis), axis


def image_grid(inputs: Mapping[str, Tensor]) -> Int[Tensor, "image side"] | None:
    """How many patches each image has along each side, where a processor says so."""
    if "target_sizes" in inputs and "pixel_values" in inputs and in_a_strip(inputs):
        return inputs["target_sizes"]
    return next((tensor for name, tensor in inputs.items() if name.startswith("image_grid")), None)


def image_size(prompt: Prompt) -> int:
    """How much of the vision side's first axis a prompt takes: its patches where they are packed, else its images."""
    if (grid := image_grid(prompt.inputs)) is not None:
        return int(grid.prod(-1).sum())
    pixels = _pixels(prompt)
    if pixels is None:
        return 0
    return pixels.flatten(0, -4).shape[0] if pixels.ndim >= 4 else pixels.shape[0]


def image_area(prompt: Prompt) -> int:
    """How much of one long row of all images' patches a prompt takes, beside other prompts."""
    if image_grid(prompt.inputs) is not None:
        return image_size(prompt)
    if "image_sizes" in prompt.inputs:  # of images that are padded to the largest (Pixtral)
        return int(prompt.inputs["image_sizes"].prod(-1).sum())
    pixels = _pixels(prompt)
    return 0 if pixels is None else pixels.numel()


def image_shapes(prompt: Prompt) -> tuple[int, ...]:
    """What must be equal for two prompts' images to correspond patch by patch."""
    if (grid := image_grid(prompt.inputs)) is not None:
        return tuple(grid.flatten().tolist())
    pixels, sizes = _pixels(prompt), prompt.inputs.get("image_sizes")
    return (*(() if pixels is None else pixels.shape), *([] if sizes is None else sizes.flatten().tolist()))


def _pixels(prompt: Prompt) -> Tensor | None:
    """The input that holds the images: `pixel_values`, or what is called pixels or patches instead."""
    named = {
        name: tensor
        for name, tensor in prompt.inputs.items()
        if ("pixel" in name or "patches" in name) and tensor.is_floating_point()
    }
    return named.get("pixel_values", next(iter(named.values()), None))


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
