"""How two prompts line up: whose activation a row may borrow, and when two images correspond patch by patch.

For two models on the same tokens (cross-model activation patching, CMAP, Prakash et al. 2402.14811) and for one model
on two prompts that differ in their images (Meng et al. 2202.05262; Zhang & Nanda 2309.16042).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import FrankenlensError
from interp.prompts.batch import PromptBatch, in_a_strip
from interp.prompts.prompt import Prompt

_CONTENT = "_content"


@dataclass(frozen=True)
class PatchBatch:
    """One batch ready for patching.

    Attributes:
        batch: the rows.
        reads: the positions whose next token is decided.
        partner: which of all prompts each row may borrow from (`partners`); -1: none; None: nothing is borrowed.
    """

    batch: PromptBatch
    reads: Bool[Tensor, "batch pos"]
    partner: Int[Tensor, " batch"] | None = None

    @property
    def partnered(self) -> Bool[Tensor, " batch"]:
        """The rows that have a partner."""
        if self.partner is None:
            return torch.zeros(len(self.batch), dtype=torch.bool, device=self.batch.roles.device)
        return self.partner >= 0

    def where(self, role: str) -> Bool[Tensor, "batch pos"]:
        """The tokens of a role; "decision" are the positions whose next token is decided, "all" every real token."""
        return self.reads if role == "decision" else self.batch.mask(role)


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


def partners(prompts: Sequence[Prompt]) -> Int[Tensor, " prompt"]:
    """For each prompt another with the same role at every position and images of the same size; -1 where none is.

    Of those that line up, the next in the order of what they hold (cyclic), so that neither the order of the prompts
    nor how they are cut into batches changes whose activation a row gets. One that holds the same is no other.

    Returns:
        Numbers of prompts, as given.
    """
    groups: dict[tuple, dict[str, int]] = {}
    held = [content(prompt) for prompt in prompts]
    for row, (prompt, own) in enumerate(zip(prompts, held, strict=True)):
        groups.setdefault((prompt.roles, image_shapes(prompt)), {}).setdefault(own, row)
    following: dict[tuple, dict[str, int]] = {}
    for group, rows in groups.items():
        order = sorted(rows)
        following[group] = dict(zip(order, [rows[one] for one in order[1:] + order[:1]], strict=True))
    found = torch.full((len(prompts),), -1)
    for row, (prompt, own) in enumerate(zip(prompts, held, strict=True)):
        after = following[prompt.roles, image_shapes(prompt)]
        found[row] = after[own] if len(after) > 1 else -1
    return found


def beside(prompts: Sequence[Prompt], rows: Sequence[int], partner: Int[Tensor, " prompt"]) -> list[Prompt]:
    """The partners of some rows, which line up with theirs; rows without one stand there themselves.

    Empty where no row has a partner: there is nothing to run. Whoever runs them makes a batch of them.
    """
    if not bool((partner[list(rows)] >= 0).any()):
        return []
    chosen = [int(partner[row]) if partner[row] >= 0 else row for row in rows]
    return [prompts[row] for row in chosen]


def content(prompt: Prompt) -> str:
    """SHA-256 of what a prompt gives to the model, worked out once, and again if its tensors have changed."""
    inputs = dict(sorted(prompt.inputs.items()))
    # tensors that are made in inference mode do not count how often they are written to
    counted = not any(tensor.is_inference() for tensor in inputs.values())
    state = [(name, id(tensor), tensor._version) for name, tensor in inputs.items()] if counted else []
    known, _, digest = prompt.__dict__.get(_CONTENT, ([], {}, ""))
    if not state or state != known:
        digest = _sha256(inputs)
        prompt.__dict__[_CONTENT] = (state, inputs, digest)  # held, so that no other tensor is given their id
    return digest


def _sha256(inputs: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in inputs.items():
        own = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(own.shape)} {own.dtype}".encode())
        digest.update(
            own.view(torch.uint8).numpy().tobytes() if own.ndim else bytes(str(own.item()), "utf-8")
        )
    return digest.hexdigest()
