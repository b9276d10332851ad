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

Where blocks add more than attention and an MLP, each further thing is a component of its own too
(`"{l}_cross_attn_out"`). Of a model that multiplies its whole stream, or whose blocks add other things instead,
decompositions are refused; so are those into heads and neurons where a norm or a factor stands between them and the
stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooks.errors import FrankenlensError
from hooks.opened import Opened
from hooks.points import writer_points
from hooks.transformer_lens.lens_model import LensModel, Norm

try:
    from transformer_lens import ActivationCache as LensCache
except ImportError as error:
    raise FrankenlensError(
        f"to_transformer_lens needs transformer-lens (pip install transformer-lens): {error}."
    ) from error


_SUMMED = ("hook_attn_out", "hook_mlp_out")
"""What TransformerLens sums."""


def _label(name: str) -> str:
    """`3_cross_attn_out` of `blocks.3.hook_cross_attn_out`, as TransformerLens labels its own."""
    _, layer, leaf = name.split(".")
    return f"{layer}_{leaf.removeprefix('hook_')}"


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
        mlp = block.writer("mlp", "moe")
        readers = (block.writers[0] if block.writers else None, "resid_pre"), (mlp, "resid_mid")
        for norm, (writer, leaf) in zip(("ln1", "ln2"), readers, strict=True):
            resid = kept.get(f"blocks.{layer}.hook_{leaf}")
            if resid is not None and writer is not None and writer.norm is not None:
                read = Norm.of(vlm.module(writer.norm), resid)
                found[f"blocks.{layer}.{norm}.hook_scale"] = read.scale(resid)
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


def _require_sum(vlm: Opened, end: int, single: bool) -> None:
    """Refuse decompositions that leave something out, up to a layer; into heads and neurons where `single`."""
    why = str(vlm.anatomy.absent.get("sum", ""))
    for layer, block in enumerate(() if why else vlm.anatomy.text.blocks[:end]):
        written = dict(zip(writer_points(f"blocks.{layer}", block), block.writers, strict=True))
        summed = [written.get(f"blocks.{layer}.{leaf}") for leaf in _SUMMED]
        if block.gain != 1.0:
            why = f"block {layer} multiplies its whole stream"
        elif None in summed:
            what = ", ".join(written) or f"what is not known ({block.why})"
            why = f"block {layer} adds {what}, not attention and an MLP"
        elif single and any(one and (one.module != one.body or one.coefficient != 1.0) for one in summed):
            why = f"in block {layer} a norm or a factor stands between heads or neurons and the stream"
        if why:
            break
    if why:
        raise FrankenlensError(
            f"TransformerLens's decomposition would not sum to the stream of {type(vlm.model).__name__}: {why}. "
            "accumulated_resid and logit_lens need no decomposition."
        )


class VLMLensCache(LensCache):
    """TransformerLens's cache; what blocks add besides attention and MLP, or is added between them, are components."""

    def decompose_resid(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's, with one component per thing that it does not know of; it sums to the stream.

        Raises:
            FrankenlensError: it does not.
        """
        more, labels = self._between(layer, kwargs.get("incl_embeds", True), kwargs.get("mode", "all"), False)
        found = self._extended(super().decompose_resid(layer, *args, **kwargs), more, labels, layer, kwargs)
        if not args and not kwargs.keys() - {"return_labels"}:
            self._check_sum(found[0] if isinstance(found, tuple) else found, layer)
        return found

    def get_full_resid_decomposition(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's, with one component per thing that it does not know of.

        Raises:
            FrankenlensError: heads and neurons do not sum to the stream.
        """
        more, labels = self._between(layer, True, "all", True)
        return self._extended(
            super().get_full_resid_decomposition(layer, *args, **kwargs), more, labels, layer, kwargs
        )

    def _check_sum(self, parts: Tensor, layer: int | None) -> None:
        model: Any = self.model
        end = model.cfg.n_layers if layer is None or layer == -1 else layer
        name = (
            f"blocks.{end}.hook_resid_pre"
            if end < model.cfg.n_layers
            else f"blocks.{end - 1}.hook_resid_post"
        )
        stream = self.cache_dict.get(name)
        if stream is None or stream.shape != parts.shape[1:]:
            return
        error = (parts.double().sum(0) - stream.double()).abs().max()
        if not error <= torch.finfo(stream.dtype).eps ** 0.5 * stream.abs().max():
            raise FrankenlensError(
                f"the parts of {model.cfg.model_name} do not sum to {name} (off by {float(error):.2e}); were some "
                "of them changed by a hook?"
            )

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> VLMLensCache:
        """TransformerLens's."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return type(self)(sliced.cache_dict, self.model, sliced.has_batch_dim)

    def _between(
        self, layer: int | None, wanted: bool, mode: str, single: bool
    ) -> tuple[list[Tensor], list[str]]:
        model: Any = self.model
        vlm, end = model._vlm, model.cfg.n_layers if layer is None or layer == -1 else layer
        if mode == "all":
            _require_sum(vlm, end, single)
        names = [f"blocks.{n}.hook_deepstack" for n in vlm.anatomy.deepstack if n < end] if wanted else []
        for n, block in enumerate(vlm.anatomy.text.blocks[:end] if mode == "all" else ()):
            names += [p for p in writer_points(f"blocks.{n}", block) if p.rpartition(".")[2] not in _SUMMED]
        missing = [name for name in names if name not in self.cache_dict]
        if missing:
            ends = "blocks.{}.hook_resid_post and blocks.{}.hook_resid_pre"
            layers = {name: int(name.split(".")[1]) for name in missing}
            needed = [
                ends.format(n, n + 1) if name.endswith("deepstack") else name for name, n in layers.items()
            ]
            raise FrankenlensError(
                f"{model.cfg.model_name} adds more than attention and MLPs, such as image features after the first "
                f"blocks; to decompose the stream, cache {'; '.join(needed)}."
            )
        labels = [_label(name) for name in names]
        return [self.cache_dict[name] for name in names], labels

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
