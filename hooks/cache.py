"""ActivationCache: what one run left at the hook points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hooks.errors import FrankenlensError, nearest
from hooks.opened import Opened


class NotCached(FrankenlensError, KeyError):
    """No such activation in the cache."""

    def __str__(self) -> str:
        return str(self.args[0])


_SHORT = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "rot_q": "attn.hook_rot_q",
    "rot_k": "attn.hook_rot_k",
    "attn_scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "result": "attn.hook_result",
    "post": "mlp.hook_post",
    "router_logits": "mlp.hook_router_logits",
    "router_weights": "mlp.hook_router_weights",
    "expert_in": "mlp.hook_expert_in",
    "expert_out": "mlp.hook_expert_out",
}
_WHOLE = {"embed": "hook_embed", "ln_final": "ln_final.hook_normalized", "projector": "projector.hook_out"}


class ActivationCache(Mapping[str, Tensor]):
    """Activations by hook name; `cache["blocks.3.attn.hook_z"]`, or TransformerLens's short `cache["z", 3]`.

    A negative layer counts from the last one that was cached.
    """

    def __init__(self, activations: dict[str, Tensor], vlm: Opened | None = None) -> None:
        self._activations, self._vlm = activations, vlm

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name = self._name(key)
        if name not in self._activations:
            raise NotCached(f"{name!r} was not cached. {nearest(name, self._activations)}")
        return self._activations[name]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and self._name(key) in self._activations

    def _name(self, key: str | tuple) -> str:
        if isinstance(key, str):
            return key if key in self._activations or key.startswith("hook_") else _WHOLE.get(key, key)
        short, layer = key
        if layer < 0:
            found = [int(name.split(".")[1]) for name in self._activations if name.startswith("blocks.")]
            layer += max(found, default=0) + 1
        return f"blocks.{layer}.{_SHORT.get(short, f'hook_{short}')}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self._activations.values())
        return f"ActivationCache({len(self)} activations, {size / 1e6:.1f} MB)"

    def to(self, device: str | torch.device) -> ActivationCache:
        """The same cache on another device."""
        return ActivationCache(
            {name: value.to(device) for name, value in self._activations.items()}, self._vlm
        )

    def to_transformer_lens(self, fold_ln: bool = True, center_unembed: bool = False) -> Any:
        """As a `transformer_lens.ActivationCache`, on which its attribution, decomposition and head tools work.

        See `hooks.transformer_lens.export` for what differs from the cache of TransformerLens's own bridge.

        Args:
            fold_ln: attributions include the final norm's gain and sum to the model's logit.
            center_unembed: as in TransformerLens.

        Raises:
            FrankenlensError: this cache is of no model, its architecture does not fit, or transformer-lens is missing.
        """
        if self._vlm is None:
            raise FrankenlensError(
                "this cache was not made by a HookedVLM, so there are no weights to attribute to."
            )
        from hooks.transformer_lens.export import to_transformer_lens

        return to_transformer_lens(self, self._vlm, fold_ln, center_unembed)
