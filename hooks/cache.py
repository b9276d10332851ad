"""ActivationCache: what one run left at the hook points."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooks.engine import HookContext
from hooks.errors import FrankenlensError, nearest
from hooks.opened import Opened


class NotCached(FrankenlensError, KeyError):
    """No such activation in the cache."""

    def __str__(self) -> str:
        return str(self.args[0])


class SeveralCalls(FrankenlensError):
    """An activation of a part that ran more than once in the forward pass."""


class Keeper:
    """A hook function that keeps copies; a tensor that it has just seen, unchanged since, is not copied again."""

    only_looks = True

    def __init__(self) -> None:
        self.kept: dict[str, list[Tensor]] = {}
        self._last: tuple[Any, int, Tensor] | None = None

    def __call__(self, activation: Tensor, hook: HookContext) -> None:
        """Keep a copy of what a hook point has."""
        version = -1 if activation.is_inference() else activation._version
        if self._last is not None and self._last[0]() is activation and self._last[1] == version >= 0:
            copied = self._last[2]
        else:
            copied = activation.detach().clone()
        self._last = weakref.ref(activation), version, copied
        self.kept.setdefault(hook.name, []).append(copied)


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


class ActivationCache(Mapping[str, Any]):
    """Activations by hook name; `cache["blocks.3.attn.hook_z"]`, or TransformerLens's short `cache["z", 3]`.

    A negative layer counts from the last one that was cached. What a part of the model left that ran several times in
    the one forward pass, as a vision tower does on an image and a video, is under `cache.calls(name)` alone.

    It is pickled and saved without the model.
    """

    def __init__(
        self,
        activations: Mapping[str, Tensor | Sequence[Tensor]],
        vlm: Opened | None = None,
    ) -> None:
        self._calls = {name: (v,) if isinstance(v, Tensor) else tuple(v) for name, v in activations.items()}
        self._vlm = vlm

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        calls = self.calls(key)
        if len(calls) > 1:
            raise SeveralCalls(
                f"{self._name(key)!r} ran {len(calls)} times in this forward pass (an image and a video in one prompt, "
                "say); cache.calls(name) has them in order."
            )
        return calls[0]

    def calls(self, key: str | tuple[str, int]) -> Sequence[Tensor]:
        """What every call in the forward pass left, in order.

        Raises:
            FrankenlensError: it was not cached.
        """
        name = self._name(key)
        if name not in self._calls:
            raise NotCached(f"{name!r} was not cached. {nearest(name, self._calls)}")
        return self._calls[name]

    def __deepcopy__(self, memo: dict) -> ActivationCache:
        return ActivationCache(copy.deepcopy(self._calls, memo), self._vlm)

    def __reduce__(self) -> tuple:
        return ActivationCache, (self._calls,)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and self._name(key) in self._calls

    def _name(self, key: str | tuple) -> str:
        if isinstance(key, str):
            return key if key in self._calls or key.startswith("hook_") else _WHOLE.get(key, key)
        short, layer = key
        if layer < 0:
            found = [int(name.split(".")[1]) for name in self._calls if name.startswith("blocks.")]
            layer += max(found, default=0) + 1
        return f"blocks.{layer}.{_SHORT.get(short, f'hook_{short}')}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for calls in self._calls.values() for t in calls)
        return f"ActivationCache({len(self)} activations, {size / 1e6:.1f} MB)"

    def to(self, device: str | torch.device) -> ActivationCache:
        """The same cache on another device."""
        moved = {name: [value.to(device) for value in calls] for name, calls in self._calls.items()}
        return ActivationCache(moved, self._vlm)

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
