"""The 2x2 that separates what RL's weights change now, at the decision, from what they changed before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooks import HookedVLM
from hooks.batches import cache_bytes, fitting, forward_bytes, in_shared_parts
from hooks.errors import FrankenlensError
from interp.decision.result import DecisionSet
from interp.metrics import LogitDifference
from interp.pair.pair import Pair
from interp.prompts import collate

NEEDS_PIXELS_ONCE = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids", "token_type_ids")


@torch.no_grad()
def two_by_two(pair: Pair, decisions: DecisionSet, batch_size: int = 32) -> xr.DataArray:
    """Whose weights decide the token, and whose keys and values of the prefix they read.

    The prefix (all but the last token) is run by one model, the last token by one model on that cache. The diagonal
    is each model as it is; RL's weights on IN's prefix say what RL changed *now*, IN's weights on RL's prefix what it
    changed *before*.

    Returns:
        The metric, dims (weights, prefix, example), coordinates `in` and `rl`.

    Raises:
        FrankenlensError: the choice is `soft`, which has no single decision position.
    """
    whole = decisions.metric
    if not isinstance(whole, LogitDifference):
        raise FrankenlensError(
            f"two_by_two needs decisions at one token: choose first or decisive, not {decisions.choice}"
        )
    models = {"in": pair.in_, "rl": pair.rl}
    values = np.full((2, 2, len(decisions)), np.nan)

    def measure(rows: Sequence[int]) -> Float[np.ndarray, "weights prefix row"]:
        batch = collate([decisions.prompts[row] for row in rows], "left")
        metric = whole.select(rows)
        found = np.full((2, 2, len(rows)), np.nan)
        for column, prefix in enumerate(models.values()):
            for row, weights in enumerate(models.values()):
                logits = _last_logits(prefix, weights, batch.inputs)
                found[row, column] = metric.of_next(logits.float()).cpu().numpy()
        return found

    width = max(map(len, decisions.prompts), default=1)
    sizes = [
        fitting(
            vlm, batch_size, forward_bytes(vlm, width) + 2 * cache_bytes(vlm, width) + 16 * vlm.n_logits,
            "two by two",
        )
        for vlm in models.values()
    ]  # fmt: skip
    for rows, found in in_shared_parts("two by two", range(len(decisions)), min(sizes), measure):
        values[..., list(rows)] = found
    coordinates = {
        "weights": list(models),
        "prefix": list(models),
        "example": [p.example.id for p in decisions.prompts],
    }
    return xr.DataArray(
        values,
        coords={**coordinates, "cluster": ("example", decisions.clusters)},
        dims=tuple(coordinates),
        name=decisions.metric.name,
        attrs={"units": decisions.metric.units, "choice": decisions.choice},
    )


def _last_logits(
    prefix: HookedVLM, weights: HookedVLM, inputs: Mapping[str, Tensor]
) -> Float[Tensor, "batch vocab"]:
    """Logits of the last token under `weights`, given the prefix's keys and values under `prefix`."""
    here = {name: tensor.to(prefix.model.device) for name, tensor in inputs.items()}
    positions = position_ids(prefix.model, here)
    images = {name: tensor for name, tensor in here.items() if name not in NEEDS_PIXELS_ONCE}
    before = {
        "input_ids": here["input_ids"][:, :-1],
        "attention_mask": here["attention_mask"][:, :-1],
        "position_ids": positions[..., :-1],
        **images,
    }
    cache = prefix(before, use_cache=True, logits_to_keep=1).past_key_values
    last = {
        "input_ids": here["input_ids"][:, -1:],
        "attention_mask": here["attention_mask"],
        "position_ids": positions[..., -1:],
    }
    last = {name: tensor.to(weights.model.device) for name, tensor in last.items()}
    return weights(last, past_key_values=cache, use_cache=True).logits[:, -1]


def position_ids(model: Any, inputs: Mapping[str, Tensor]) -> Int[Tensor, "*axes batch pos"]:
    """Positions as the model would work them out for the whole prompt.

    Models with multimodal rotary positions (axes: time, height, width) keep an offset between calls; positions given
    explicitly do not depend on it.
    """
    mask = inputs["attention_mask"]
    if "image_grid_thw" in inputs and hasattr(model.model, "get_rope_index"):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return model.model.get_rope_index(**{name: inputs[name] for name in names})[0]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
