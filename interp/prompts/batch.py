"""Prompts of different lengths as one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Int8, Shaped
from torch import Tensor

from hooks.errors import FrankenlensError, shown
from interp.prompts.prompt import TOKEN_TENSORS, Prompt
from interp.prompts.roles import PADDING_CODE, ROLE_CODES, ROLES

PaddingSide = Literal["left", "right"]
Rows = Sequence[int] | Shaped[Tensor, " n"] | Shaped[np.ndarray, " n"]
"""Numbers of rows."""


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Padded prompts, ready for `model(**batch.inputs)`.

    Attributes:
        prompts: the rows.
        inputs: processor tensors; tokens are padded, images follow one another.
        roles: `ROLE_CODES` of every token, `PADDING_CODE` on padding.
        lengths: real tokens of each row.
        padding_side: where the padding is.
        pad_token_id: what it is made of.
        cut: columns that were cut off at the left; see `interp.sweep`.
    """

    prompts: tuple[Prompt, ...]
    inputs: dict[str, Tensor] = field(repr=False)
    roles: Int8[Tensor, "batch pos"] = field(repr=False)
    lengths: Int[Tensor, " batch"]
    padding_side: PaddingSide
    pad_token_id: int
    cut: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def mask(self, role: str) -> Bool[Tensor, "batch pos"]:
        """Where a role is; `all` is every real token, `decision` each row's last one.

        Raises:
            FrankenlensError: no such role.
        """
        if role == "all":
            return self.roles != PADDING_CODE
        if role == "decision":
            columns = torch.arange(self.roles.shape[1], device=self.roles.device)
            return columns[None] == self.last[:, None]
        if role not in ROLE_CODES:
            raise FrankenlensError(
                f"no role {role!r}; choose one of {', '.join((*ROLES, 'decision', 'all'))}"
            )
        return self.roles == ROLE_CODES[role]

    @property
    def with_image(self) -> Bool[Tensor, " batch"]:
        """The rows that have an image."""
        return torch.tensor([prompt.has_image for prompt in self.prompts], device=self.roles.device)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Column of each row's last real token: the position whose next token is decided."""
        return self.columns(self.lengths - 1)

    decision = last

    def columns(self, tokens: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Columns of the batch in which a token of each row stands, counted from the row's first real token."""
        width = self.roles.shape[1] + self.cut
        return tokens + (width - self.lengths if self.padding_side == "left" else 0) - self.cut

    def select(self, rows: Rows) -> PromptBatch:
        """The batch of some rows, padded anew."""
        chosen = [self.prompts[row] for row in numbers_of(rows)]
        return collate(chosen, self.padding_side, self.pad_token_id).to(self.roles.device)

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same batch on a device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, roles=self.roles.to(device), lengths=self.lengths.to(device))


def numbers_of(rows: Rows) -> list[int]:
    """Numbers of rows as integers.

    Raises:
        FrankenlensError: something else than integers, such as a mask, whose True would be row 1.
    """
    numbers = rows.tolist() if hasattr(rows, "tolist") else list(rows)  # type: ignore[union-attr]
    if not isinstance(numbers, list) or not all(
        isinstance(one, Integral) and not isinstance(one, bool) for one in numbers
    ):
        raise FrankenlensError(
            f"rows are chosen by their numbers, and {shown(numbers)} are none; of a mask, mask.nonzero()[:, 0]"
        )
    return [int(one) for one in numbers]


def collate(
    prompts: Sequence[Prompt], padding_side: PaddingSide = "right", pad_token_id: int | None = None
) -> PromptBatch:
    """Pad prompts to one length.

    With left padding, models that count positions from the first column are given `position_ids`; those with
    multimodal positions work them out themselves from the attention mask.

    Arguments:
        prompts: at least one.
        pad_token_id: by default the tokenizer's.

    Raises:
        FrankenlensError: no prompts, an unknown side, or images of shapes that cannot be joined.
    """
    if not prompts or padding_side not in ("left", "right"):
        raise FrankenlensError(
            f"collate takes at least one prompt and padding_side 'left' or 'right', not {len(prompts)} prompts and "
            f"{padding_side!r}"
        )
    pad = prompts[0].builder.pad_id if pad_token_id is None else pad_token_id
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    names = dict.fromkeys(name for prompt in prompts for name in prompt.inputs)
    inputs: dict[str, Tensor] = {}
    for name in names:
        if name in TOKEN_TENSORS:
            rows = [p.inputs.get(name, torch.zeros_like(p.inputs["input_ids"]))[0] for p in prompts]
            inputs[name] = _padded(rows, padding_side, pad if name == "input_ids" else 0)
        else:
            given = [p for p in prompts if name in p.inputs]
            strips = name == "pixel_values" and all(in_a_strip(p.inputs) for p in given)
            inputs[name] = _joined(name, [p.inputs[name] for p in given], -1 if strips else 0)
    if padding_side == "left" and "image_grid_thw" not in inputs:
        inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    codes = [torch.tensor([ROLE_CODES[role] for role in p.roles], dtype=torch.int8) for p in prompts]
    return PromptBatch(
        tuple(prompts), inputs, _padded(codes, padding_side, PADDING_CODE), lengths, padding_side, pad
    )


def _padded(rows: Sequence[Tensor], side: PaddingSide, value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=value, padding_side=side
    )


def in_a_strip(inputs: Mapping[str, Tensor]) -> bool:
    """Whether all images are one row of patches behind one another, [1 channel side patch*side] (MiniCPM-V)."""
    pixels, sizes = inputs["pixel_values"], inputs.get("target_sizes")
    if sizes is None or pixels.ndim != 4 or len(pixels) != 1:
        return False
    return pixels.shape[-1] == int(sizes.prod(-1).sum()) * pixels.shape[-2]


def _joined(name: str, tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Image tensors one after another; where rows hold different numbers of images (axis 1), padded with zeros."""
    if tensors[0].ndim >= 4 and axis == 0:
        most = max(tensor.shape[1] for tensor in tensors)
        tensors = [_grown(tensor, most) for tensor in tensors]
    try:
        return torch.cat(list(tensors), dim=axis)
    except RuntimeError as error:
        shapes = ", ".join(dict.fromkeys(str(tuple(t.shape)) for t in tensors))
        raise FrankenlensError(
            f"{name} of these prompts cannot be joined into a batch, shapes {shapes}; give prompts of images that the "
            "processor brings to one size, or run them one at a time"
        ) from error


def _grown(tensor: Tensor, n: int) -> Tensor:
    missing = n - tensor.shape[1]
    return (
        torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)
        if missing
        else tensor
    )
