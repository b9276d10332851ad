"""A cache as TransformerLens's own ActivationCache, with the smallest stand-in for a model that its tools ask for.

What works on it: `accumulated_resid`, `decompose_resid`, `logit_attrs`, `logit_lens`, `stack_head_results`,
`stack_neuron_results`, `get_full_resid_decomposition`, `stack_activation`, slicing and moving. It cannot run.

Three things differ from the cache of TransformerLens's own bridge, and are meant to:

- `hook_embed` is what the first block reads, image features included, so that the decomposition sums at image tokens.
- By default the final norm's gain (and bias) is folded into `W_U` (and `b_U`), as `fold_ln` of `process_weights` does,
  so attributions to a token sum to the model's own logit. `fold_ln=False` is the bridge as it boots, whose attributions
  leave the gain out; `center_unembed=True` besides is the bridge in compatibility mode, but for value biases, which
  that mode moves from the heads to `b_O`.
- Where a model adds image features between blocks (Qwen3-VL's DeepStack), resid_post[l] is not resid_pre[l+1]. What was
  added is a component of its own, `"{l}_deepstack"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooks.errors import FrankenlensError
from hooks.opened import Opened
from hooks.transformer_lens.lens_model import LensModel, Norm

try:
    from transformer_lens import ActivationCache as LensCache
except ImportError as error:
    raise FrankenlensError(
        f"to_transformer_lens needs transformer-lens (pip install transformer-lens): {error}."
    ) from error


def to_transformer_lens(
    activations: Mapping[str, Tensor], vlm: Opened, fold_ln: bool = True, center_unembed: bool = False
) -> LensCache:
    """The decoder's activations as TransformerLens's cache; see the module for what works and what differs.

    The vision tower's are left out: their first axis is not the batch.

    Args:
        activations: by hook name.
        vlm: the model they are of.
        fold_ln: W_U with the final norm's gain; False leaves the gain out of all attributions.
        center_unembed: W_U with mean 0 over the vocabulary, which moves all logits of a token position alike.

    Raises:
        FrankenlensError: the norms are of another kind, or logits are scaled after the unembedding.
    """
    kept = {
        name: value
        for name, value in activations.items()
        if name.startswith(("blocks.", "ln_final.", "hook_"))
    }
    kept = {name: value for name, value in kept.items() if not name.endswith("hook_deepstack")}
    if "blocks.0.hook_resid_pre" in kept:
        kept["hook_embed"] = kept["blocks.0.hook_resid_pre"]
    kept |= _scales(kept, vlm)
    kept |= _deepstack(kept, vlm)
    return VLMLensCache(kept, LensModel(vlm, fold_ln, center_unembed))


def _scales(kept: Mapping[str, Tensor], vlm: Opened) -> dict[str, Tensor]:
    """What each norm divided by, which TransformerLens's `apply_ln` reads."""
    found = {}
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        for norm, path, leaf in (("ln1", block.pre_norm, "resid_pre"), ("ln2", block.mid_norm, "resid_mid")):
            if (resid := kept.get(f"blocks.{layer}.hook_{leaf}")) is not None:
                found[f"blocks.{layer}.{norm}.hook_scale"] = Norm.of(vlm.module(path), resid).scale(resid)
    last = f"blocks.{vlm.n_layers - 1}.hook_resid_post"
    if last in kept:
        norm = Norm.of(vlm.module(vlm.anatomy.final_norm), kept[last])
        found["ln_final.hook_scale"] = norm.scale(kept[last])
        # TransformerLens's name for the stream before the gain; ours is the norm's output.
        found["ln_final.hook_normalized"] = norm.bare(kept[last])
    return found


def _deepstack(kept: Mapping[str, Tensor], vlm: Opened) -> dict[str, Tensor]:
    """What is added between blocks, layer by layer, where both sides of the gap are cached."""
    found = {}
    for layer in vlm.anatomy.deepstack:
        after, before = (
            kept.get(f"blocks.{layer + 1}.hook_resid_pre"),
            kept.get(f"blocks.{layer}.hook_resid_post"),
        )
        if after is not None and before is not None:
            found[f"blocks.{layer}.hook_deepstack"] = after - before
    return found


class VLMLensCache(LensCache):
    """TransformerLens's cache; its decompositions have what DeepStack adds between blocks as components."""

    def decompose_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's, with one `"{l}_deepstack"` per layer after which image features are added."""
        more, labels = self._between(layer, kwargs.get("incl_embeds", True))
        return self._extended(super().decompose_resid(layer, *args, **kwargs), more, labels, layer, kwargs)

    def get_full_resid_decomposition(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's, with one `"{l}_deepstack"` per layer after which image features are added."""
        more, labels = self._between(layer, True)
        return self._extended(
            super().get_full_resid_decomposition(layer, *args, **kwargs), more, labels, layer, kwargs
        )

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> VLMLensCache:
        """TransformerLens's."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return type(self)(sliced.cache_dict, self.model, sliced.has_batch_dim)

    def _between(self, layer: int | None, wanted: bool) -> tuple[list[Tensor], list[str]]:
        model: Any = self.model
        end = model.cfg.n_layers if layer is None or layer == -1 else layer
        layers = [layer for layer in model._vlm.anatomy.deepstack if layer < end] if wanted else []
        missing = [n for n in layers if f"blocks.{n}.hook_deepstack" not in self.cache_dict]
        if missing:
            needed = [f"blocks.{n}.hook_resid_post and blocks.{n + 1}.hook_resid_pre" for n in missing]
            raise FrankenlensError(
                f"{model.cfg.model_name} adds image features after the first blocks; to decompose the stream, cache "
                f"{'; '.join(needed)}."
            )
        return [self.cache_dict[f"blocks.{n}.hook_deepstack"] for n in layers], [
            f"{n}_deepstack" for n in layers
        ]

    def _extended(
        self, found: Any, more: list[Tensor], labels: list[str], layer: int | None, kwargs: dict
    ) -> Any:
        if not more:
            return found
        from transformer_lens.utilities import Slice

        given = kwargs.get("pos_slice")
        cut = given if isinstance(given, Slice) else Slice(given)
        stack = torch.stack([cut.apply(value, dim=-2) for value in more])
        if kwargs.get("apply_ln"):
            stack = self.apply_ln_to_stack(
                stack, layer, pos_slice=cut, mlp_input=kwargs.get("mlp_input", False)
            )
        if (onto := kwargs.get("project_output_onto")) is not None:
            stack = stack @ onto
        if isinstance(found, tuple):
            return torch.cat([found[0], stack]), [*found[1], *labels]
        return torch.cat([found, stack])
