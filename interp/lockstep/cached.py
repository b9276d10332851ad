"""One model, its KV cache and a batch of prompts: prefill, then a token at a time, as transformers' `generate` does."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from hooks import FrankenlensError, HookedVLM
from interp.prompts import PromptBatch

_AFTER_PREFILL = (
    "past_key_values",
    "use_cache",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
    "logits_to_keep",
)


class CachedModel:
    """A model that reads a batch and then what is written after it; several take turns on the same tokens.

    Inputs are prepared, and positions continued, by the model's own generation machinery. Positions are handed over at
    every step, so nothing depends on what another run left behind in the model (M-RoPE's offset).

    Args:
        vlm: the opened model.
        batch: padded on the left.
    """

    def __init__(self, vlm: HookedVLM, batch: PromptBatch) -> None:
        self.vlm = vlm
        model: Any = vlm.model
        inputs: dict[str, Any] = dict(batch.to(vlm.device).inputs)
        self._ids: Int[Tensor, "row pos"] = inputs.pop("input_ids")
        self._state: dict[str, Any] = {
            **inputs,
            "past_key_values": DynamicCache(config=model.config.get_text_config(decoder=True)),
            "use_cache": True,
        }
        arguments = inspect.signature(model.forward).parameters
        if "position_ids" in arguments and "position_ids" not in self._state:
            self._state["position_ids"] = model._prepare_position_ids_for_generation(self._ids, self._state)
        if bool(self._state["attention_mask"].all()):
            self._state["attention_mask"] = None  # as `generate` does: no mask is faster than one of ones
        if "logits_to_keep" in arguments:
            self._state["logits_to_keep"] = 1
        self._first = True

    def read(self, tokens: Int[Tensor, " row"] | None = None) -> Float[Tensor, "row vocab"]:
        """Read the prompts (no tokens given), or one more token of each row; the logits of the next one (float32)."""
        if tokens is not None:
            self._ids = tokens.to(self._ids.device)[:, None]
        return self._forward()

    def read_again(self) -> Float[Tensor, "row vocab"]:
        """Read the last token of each row once more, in place of what the cache holds of it.

        Raises:
            FrankenlensError: a sliding window's cache has forgotten what stood before it.
        """
        cache = self._state["past_key_values"]
        if any(cache.is_sliding):
            raise FrankenlensError(
                f"{type(self.vlm.model).__name__} keeps a sliding window of its past, so a token cannot be read "
                "again: use from_divergence=False"
            )
        cache.crop(-1)
        if self._state["attention_mask"] is not None:
            self._state["attention_mask"] = self._state["attention_mask"][:, :-1]
        if "position_ids" in self._state:
            self._state["position_ids"] = self._state["position_ids"] - 1
        return self._forward()

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows only."""
        state = self._state
        state["past_key_values"].batch_select_indices(rows.to(self._ids.device))
        self._ids = self._ids[rows]
        for name in ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"):
            if state.get(name) is not None:
                # multimodal positions are [3 or 4, row, pos]
                state[name] = state[name][:, rows] if state[name].ndim == 3 else state[name][rows]

    def _forward(self) -> Float[Tensor, "row vocab"]:
        model: Any = self.vlm.model
        length = None if self._first else 1
        inputs = model.prepare_inputs_for_generation(
            self._ids, next_sequence_length=length, is_first_iteration=self._first, **self._state
        )
        output = model(**inputs, return_dict=True)
        state = model._update_model_kwargs_for_generation(output, self._state)
        self._state = {name: state[name] for name in _AFTER_PREFILL if name in state}
        for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):
            if state.get(name) is not None:
                self._state[name] = state[name][..., -1:]  # only the next token's is asked for again
        self._ids, self._first = self._ids[:, -1:], False
        return output.logits[:, -1].to(copy=True, dtype=torch.float32)
