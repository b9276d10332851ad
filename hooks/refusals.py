"""What a run under hooks refuses: keywords that would be swallowed, and backward passes that the hooks would miss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hooks.errors import FrankenlensError

# Keywords of TransformerLens that Hugging Face's **kwargs would swallow without a word.
_FOREIGN = {
    "stop_at_layer": "a hook that raises, or names_filter",
    "start_at_layer": "interp.sweep.rerun.CleanRun",
    "remove_batch_dim": "cache[name][0]",
    "incl_bwd": "retain_grad() inside a hook",
    "bwd_hooks": "retain_grad() inside a hook",
    "device": "cache.to(device)",
    "return_type": "the output's .logits",
    "return_cache_object": "dict(cache)",
    "reset_hooks_end": "nothing: hooks end with their context",
    "clear_contexts": "nothing: contexts end with their hook",
    "pos_slice": "slicing the cache",
}


def refuse_broken(model: nn.Module, logits: Tensor) -> None:
    """Refuse a model whose logits are no numbers because weights of it are none."""
    if not bool(logits.isnan().any()):
        return
    weights = [(name, weight) for name, weight in model.named_parameters() if not weight.is_meta]
    broken = [name for name, weight in weights if not bool(weight.isfinite().all())]
    if broken:
        raise FrankenlensError(
            f"{type(model).__name__}: {len(broken)} weights hold NaN or infinity, so its logits are NaN: "
            f"{', '.join(broken[:5])}. The checkpoint is broken (a training step that diverged, or a damaged file): "
            "take an earlier one, or download it again."
        )
    raise FrankenlensError(
        f"{type(model).__name__}: its logits are NaN although every weight is a number, so what it computes overflows "
        f"{str(logits.dtype).removeprefix('torch.')}: load it with dtype='bfloat16' or 'float32'."
    )


def refuse_inference_weights(model: nn.Module) -> None:
    """Refuse weights that PyTorch keeps out of every backward pass, which proofs and attributions need."""
    made = [name for name, weight in model.named_parameters() if weight.is_inference()]
    if made:
        raise FrankenlensError(
            f"{type(model).__name__}: {len(made)} weights ({', '.join(made[:3])}) were made under "
            "torch.inference_mode(), so no gradient can pass them: load the model outside of it (torch.no_grad() "
            "does no harm), or open it with check=False to read and write without gradients."
        )


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model inside PEFT's own class, whose projections are no matrices that could be read or moved."""
    if type(model).__module__.split(".")[0] == "peft":
        raise FrankenlensError(
            f"a {type(model).__name__} holds its adapter beside its weights, so heads, neurons and grafts have no "
            "weights of their own: open model.merge_and_unload(), or give the adapter's folder as RL of "
            "Pair.from_pretrained, which merges it and proves the result."
        )


def refuse_checkpointing(model: nn.Module) -> None:
    """Refuse hooks that would be gone when checkpointing repeats the forward pass during backward."""
    modules = model.modules() if model.training else ()
    if torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) for module in modules
    ):
        raise FrankenlensError(
            "gradient checkpointing repeats the forward pass during backward, when these hooks are gone: call "
            "backward inside `with vlm.hooks(...)`, or model.gradient_checkpointing_disable()."
        )


def refuse_foreign(kwargs: Mapping[str, Any]) -> None:
    """Refuse keywords of TransformerLens that have another name here."""
    for name in kwargs:
        if name in _FOREIGN:
            raise FrankenlensError(f"{name!r} of TransformerLens does not exist here; use {_FOREIGN[name]}.")
