"""ActivationCache: what one run left at the hook points."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hooks.errors import FrankenlensError, nearest

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
}


class ActivationCache(Mapping[str, Tensor]):
    """Activations by hook name; `cache["blocks.3.attn.hook_z"]` or, as in TransformerLens, `cache["z", 3]`."""

    def __init__(self, activations: dict[str, Tensor]) -> None:
        self._activations = activations

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name = key if isinstance(key, str) else f"blocks.{key[1]}.{_SHORT.get(key[0], f'hook_{key[0]}')}"
        if name not in self._activations:
            raise FrankenlensError(f"{name!r} was not cached. {nearest(name, self._activations)}")
        return self._activations[name]

    def __contains__(self, key: object) -> bool:
        return key in self._activations

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self._activations.values())
        return f"ActivationCache({len(self)} activations, {size / 1e6:.1f} MB)"

    def to(self, device: str | torch.device) -> "ActivationCache":
        """The same cache on another device."""
        return ActivationCache({name: value.to(device) for name, value in self._activations.items()})
