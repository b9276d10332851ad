"""TRL's GRPO trainer with each prompt run once for all its samples in the loss.

A group's samples share image and question, so one row holds the prompt and, as branches blind to each other, all
its completions: the same log-probabilities (tests/experiments/test_triple.py) for about a third of the compute.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from trl import GRPOTrainer

from experiments.triple.packing import branch_mask
from hooks.errors import FrankenlensError


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` for Qwen2-VL-like models; overrides how log-probabilities are computed, nothing else."""

    def _get_per_token_logps_and_entropies(  # type: ignore[override]
        self,
        model: torch.nn.Module,
        input_ids: Int[Tensor, "sample pos"],
        attention_mask: Int[Tensor, "sample pos"],
        logits_to_keep: int,
        compute_entropy: bool = False,
        pixel_values: Float[Tensor, "patch pixel"] | None = None,
        image_grid_thw: Int[Tensor, "image 3"] | None = None,
        mm_token_type_ids: Int[Tensor, "sample pos"] | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "sample completion"], Float[Tensor, "sample completion"] | None, None]:
        if pixel_values is None or image_grid_thw is None or mm_token_type_ids is None:
            raise FrankenlensError("every prompt needs one image, and the processor must mark image tokens")
        rows = pixel_values.reshape(len(input_ids), -1, pixel_values.shape[-1])
        prompt = input_ids.shape[1] - logits_to_keep
        groups: dict[bytes, list[int]] = defaultdict(list)
        for index, (ids, image) in enumerate(zip(input_ids[:, :prompt], rows, strict=True)):
            groups[ids.cpu().numpy().tobytes() + image.cpu().numpy().tobytes()].append(index)
        members = list(groups.values())
        packed = _pack(model, input_ids, attention_mask, mm_token_type_ids, image_grid_thw, prompt, members)
        first = [indices[0] for indices in members]
        hidden = model.model(  # type: ignore[operator]
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            attention_mask=packed["attention_mask"],
            pixel_values=rows[first].flatten(0, 1),
            image_grid_thw=image_grid_thw[first],
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[packed["source"]])  # type: ignore[operator]
        log_probs = logits.float().log_softmax(-1)
        chosen = log_probs.gather(-1, input_ids[:, prompt:, None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1) if compute_entropy else None
        return chosen, entropy, None


def _pack(
    model: torch.nn.Module,
    input_ids: Int[Tensor, "sample pos"],
    attention_mask: Int[Tensor, "sample pos"],
    mm_token_type_ids: Int[Tensor, "sample pos"],
    image_grid_thw: Int[Tensor, "image 3"],
    prompt: int,
    members: list[list[int]],
) -> dict[str, Tensor]:
    """One row per group: its prompt, then its completions.

    Returns:
        `input_ids` [group pos], `position_ids` [3 group pos], `attention_mask` [group 1 query key] (bool), and
        `source` [sample completion]: the place, in the flattened rows, that predicts each completion token.
    """
    lengths = attention_mask[:, prompt:].sum(1).tolist()
    prompts = [input_ids[group[0], :prompt][attention_mask[group[0], :prompt].bool()] for group in members]
    width = max(
        len(ids) + sum(lengths[i] for i in group) for ids, group in zip(prompts, members, strict=True)
    )
    ids = input_ids.new_zeros(len(members), width)
    branch = input_ids.new_full((len(members), width), -1)
    positions = input_ids.new_zeros(3, len(members), width)
    source = input_ids.new_zeros(len(input_ids), input_ids.shape[1] - prompt)
    for row, (start, group) in enumerate(zip(prompts, members, strict=True)):
        n, kept = len(start), attention_mask[group[0], :prompt].bool()
        image = image_grid_thw[group[0]][None]
        marks = mm_token_type_ids[group[0], :prompt][kept][None]
        places, _ = model.model.get_rope_index(  # type: ignore[operator]
            start[None], mm_token_type_ids=marks, image_grid_thw=image
        )
        ids[row, :n], branch[row, :n], positions[:, row, :n] = start, 0, places[:, 0]
        next_place, at = int(places.max()) + 1, n
        for number, index in enumerate(group, start=1):
            length = lengths[index]
            ids[row, at : at + length] = input_ids[index, prompt : prompt + length]
            branch[row, at : at + length] = number
            positions[:, row, at : at + length] = torch.arange(next_place, next_place + length)
            source[index, 0] = row * width + n - 1
            source[index, 1:length] = row * width + torch.arange(at, at + length - 1)
            at += length
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": branch_mask(branch),
        "source": source,
    }
