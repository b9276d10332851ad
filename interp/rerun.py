"""One clean forward, from which the decoder can be rerun at any layer: what lies below is not computed again."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks import HookedVLM


class CleanRun:
    """A forward of one model on one batch, with the activations asked for.

    `rerun(layer, fwd_hooks)` starts at the stored residual of that layer, with the very arguments that the blocks
    got, so its logits are bit for bit those of a full forward. That is checked once, at construction; where an
    architecture does something between blocks that is not known here, every rerun is a full forward, with a warning.

    Attributes:
        logits: [batch pos vocab].
        cache: the activations named by `names`.
    """

    def __init__(self, vlm: HookedVLM, inputs: Mapping[str, Any], names: Iterable[str] = ()) -> None:
        self.vlm, self.inputs = vlm, inputs
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._blocks = [vlm.module(block.path) for block in vlm.anatomy.text.blocks]
        deepstack = [name for name in vlm.hook_points if name.endswith("hook_deepstack")]
        handles = [block.register_forward_pre_hook(self._record, with_kwargs=True) for block in self._blocks]
        try:
            with torch.no_grad():
                output, self.cache = vlm.run_with_cache(inputs, [*names, *deepstack], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.logits: Float[Tensor, "batch pos vocab"] = output.logits
        self._deepstack = {int(name.split(".")[1]): self.cache[name] for name in deepstack}
        self._resumable = torch.equal(self._decode(0), self.logits)
        if not self._resumable:
            warnings.warn(
                f"{type(vlm.model).__name__} cannot be resumed at a stored residual; every rerun is a full forward.",
                stacklevel=2,
            )

    def rerun(
        self, fwd_hooks: Iterable[tuple[str, Any]], layer: int | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits with hooks on; `layer` is the first decoder block the hooks act in (None: before the decoder)."""
        with torch.no_grad(), self.vlm.hooks(fwd_hooks):
            if layer is None or not self._resumable:
                return self.vlm(self.inputs, use_cache=False).logits
            return self._decode(layer)

    def _record(self, block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls.append((args, kwargs))

    @torch.no_grad()
    def _decode(self, first: int) -> Float[Tensor, "batch pos vocab"]:
        args, kwargs = self._calls[first]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for layer in range(first, len(self._blocks)):
            args, kwargs = self._calls[layer]
            if "hidden_states" in kwargs:
                out = self._blocks[layer](*args, **{**kwargs, "hidden_states": hidden})
            else:
                out = self._blocks[layer](hidden, *args[1:], **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
            if layer in self._deepstack:
                hidden = hidden.clone()
                hidden[self._image_mask] = hidden[self._image_mask] + self._deepstack[layer].to(hidden.dtype)
        normalized = self.vlm.module(self.vlm.anatomy.final_norm)(hidden)
        return self.vlm.module(self.vlm.anatomy.unembed)(normalized)

    @property
    def _image_mask(self) -> Tensor:
        return self.inputs["input_ids"].to(self.vlm.device) == self.vlm.model.config.image_token_id
