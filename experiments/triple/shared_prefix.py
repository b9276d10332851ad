"""TRL's GRPO trainer with each prompt run once for all its samples in the loss.

A group's samples share image and question, so one row holds the prompt and, as branches blind to each other, all
its completions: the same log-probabilities (tests/experiments/test_shared_prefix.py) for about a third of the compute.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from experiments.triple.grpo_settings import require_followed, require_one_device
from experiments.triple.packing import branch_mask
from hooks.errors import FrankenlensError

MASKED_ATTENTION = ("sdpa", "eager")
"""Kinds of attention that take a mask in which branches do not see each other."""


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` for Qwen2-VL-like models; overrides how log-probabilities are computed, nothing else.

    Raises:
        FrankenlensError: a setting that this does not follow (`experiments.triple.grpo_settings`), several devices, or
            a kind of attention that takes no mask.
    """

    def __init__(self, model: Any, reward_funcs: Any, args: GRPOConfig | None = None, **kwargs: Any) -> None:
        if args is not None:
            require_followed({name: getattr(args, name) for name in args.__dataclass_fields__})
            require_one_device(args)
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if attention not in MASKED_ATTENTION:
            raise FrankenlensError(
                f"the model's attention is {attention!r}, which takes no mask that hides a prompt's completions from "
                f"each other: load it with attn_implementation={MASKED_ATTENTION[0]!r}."
            )
        super().__init__(model, reward_funcs, args, **kwargs)

    def _get_per_token_logps_and_entropies(  # type: ignore[override]
        self,
        model: torch.nn.Module,
        input_ids: Int[Tensor, "sample pos"],
        attention_mask: Int[Tensor, "sample pos"],
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        pixel_values: Float[Tensor, "patch pixel"] | None = None,
        image_grid_thw: Int[Tensor, "image 3"] | None = None,
        mm_token_type_ids: Int[Tensor, "sample pos"] | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "sample completion"], Float[Tensor, "sample completion"] | None, None]:
        n = len(input_ids)
        if (
            pixel_values is None
            or image_grid_thw is None
            or mm_token_type_ids is None
            or len(image_grid_thw) != n
        ):
            raise FrankenlensError("every prompt needs one image, and the processor must mark image tokens")
        images = pixel_values.split(image_grid_thw.prod(-1).tolist())
        size, found = batch_size or n, []
        for start in range(0, n, size):
            here = slice(start, start + size)
            ids, mask, marks = (one[here] for one in (input_ids, attention_mask, mm_token_type_ids))
            found.append(
                self._scores(model, ids, mask, marks, images[here], image_grid_thw[here], logits_to_keep)
            )
        chosen = torch.cat([log_probs for log_probs, _ in found])
        return chosen, torch.cat([entropy for _, entropy in found]) if compute_entropy else None, None

    def _scores(
        self,
        model: torch.nn.Module,
        input_ids: Int[Tensor, "sample pos"],
        attention_mask: Int[Tensor, "sample pos"],
        mm_token_type_ids: Int[Tensor, "sample pos"],
        images: Sequence[Float[Tensor, "patch pixel"]],
        image_grid_thw: Int[Tensor, "sample 3"],
        n_kept: int,
    ) -> tuple[Float[Tensor, "sample completion"], Float[Tensor, "sample completion"]]:
        """Log-probability and entropy (nats) of every completion token at the temperature; 0 where there is none."""
        prompt = input_ids.shape[1] - n_kept
        groups: dict[tuple[bytes, ...], list[int]] = defaultdict(list)
        for index, same in enumerate(zip(input_ids[:, :prompt], images, image_grid_thw, strict=True)):
            groups[tuple(one.cpu().numpy().tobytes() for one in same)].append(index)
        members = list(groups.values())
        packed = _pack(model, input_ids, attention_mask, mm_token_type_ids, image_grid_thw, prompt, members)
        first = [indices[0] for indices in members]
        there = attention_mask[:, prompt:].bool()
        with self.accelerator.autocast():
            hidden = model.model(  # type: ignore[operator]
                input_ids=packed["input_ids"],
                position_ids=packed["position_ids"],
                attention_mask=packed["attention_mask"],
                pixel_values=torch.cat([images[index] for index in first]),
                image_grid_thw=image_grid_thw[first],
                use_cache=False,
            ).last_hidden_state
            hidden = hidden.flatten(0, 1)[packed["source"][there]]
            logits = model.lm_head(hidden)  # type: ignore[operator]
        log_probs = (logits.float() / self.temperature).log_softmax(-1)
        chosen = log_probs.gather(-1, input_ids[:, prompt:][there][:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        empty = chosen.new_zeros(there.shape)
        return empty.masked_scatter(there, chosen), empty.masked_scatter(there, entropy)


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
            if length:  # a completion that was cut off may be masked out whole
                source[index, 0] = row * width + n - 1
                source[index, 1:length] = row * width + torch.arange(at, at + length - 1)
            at += length
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": branch_mask(branch),
        "source": source,
    }
