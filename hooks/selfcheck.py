"""Proofs, on the very model that was opened, that its hook points are what they say they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hooks.errors import FrankenlensError
from hooks.opened import Opened

_EQUATIONS = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


def check_inputs(processor: Any, side: int = 64) -> dict[str, Any]:
    """One prompt with one small random image, as tensors of this processor.

    Raises:
        FrankenlensError: there is no processor.
    """
    if processor is None:
        raise FrankenlensError(
            "the self-check needs a processor (or `inputs=` with an image); check=False skips it."
        )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": "a b"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    else:
        text = f"{processor.image_token} a b"
    return dict(processor(text=[text], images=[image], return_tensors="pt"))


def tolerance(logits: Float[Tensor, "..."]) -> float:
    """1e-5 x max(1, largest logit) in fp32; in a half precision, sixteen of its own rounding steps."""
    scale = max(1.0, logits.abs().max().item())
    return scale * (
        1e-5 if logits.dtype in (torch.float32, torch.float64) else 16 * torch.finfo(logits.dtype).eps
    )


def self_check(vlm: Opened, inputs: Mapping[str, Any]) -> dict[str, str]:
    """Prove every listed point in two forwards and one backward.

    Returns:
        The dead points, name → reason.

    Raises:
        FrankenlensError: writing all points' own values back changes the logits.
    """
    taps: dict[str, Tensor] = {}

    def write_back(activation: Tensor, hook: Any) -> Tensor:
        own = activation.clone()
        taps[hook.name] = own if own.requires_grad else own.requires_grad_()
        return own

    with _undisturbed(vlm):
        with torch.no_grad():
            bare = _logits(vlm, inputs)
        with torch.enable_grad(), vlm.hooks([(name, write_back) for name in vlm.hook_points]):
            logits = _logits(vlm, inputs)
        moved = (logits.detach() - bare).abs().max().item()
        allowed = tolerance(bare)
        if moved > allowed:  # some models magnify rounding; dense attention rounds otherwise than SDPA
            allowed = max(allowed, 4 * rounding_spread(vlm, inputs, bare))
        if not moved <= allowed:
            raise FrankenlensError(
                f"self-check of {type(vlm.model).__name__}: writing every hook point's own value back moved the logits "
                f"by {moved:.2e} (allowed {allowed:.2e}). This architecture is not opened"
                " correctly; please report it."
            )
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(logits.shape, generator=generator).to(logits.device, logits.dtype)
        gradients = torch.autograd.grad(
            logits, list(taps.values()), grad_outputs=direction, allow_unused=True
        )
        _check_equations(vlm, taps)
    live = {name for name, grad in zip(taps, gradients, strict=True) if grad is not None and bool(grad.any())}
    return {name: _reason(vlm, name, name in taps) for name in vlm.hook_points if name not in live}


@torch.no_grad()
def rounding_spread(vlm: Opened, inputs: Mapping[str, Any], bare: Float[Tensor, "batch pos vocab"]) -> float:
    """How far the logits move when every residual stream before a block is off by one step of its own rounding."""
    generator = torch.Generator().manual_seed(0)

    def off_by_one_step(activation: Tensor, hook: Any) -> Tensor:
        signs = torch.randint(0, 2, activation.shape, generator=generator).to(activation) * 2 - 1
        return activation * (1 + signs * torch.finfo(activation.dtype).eps)

    names = [name for name in vlm.hook_points if name.endswith("hook_resid_pre")]
    with vlm.hooks([(name, off_by_one_step) for name in names]):
        return (_logits(vlm, inputs) - bare).abs().max().item()


@torch.no_grad()
def _check_equations(vlm: Opened, taps: Mapping[str, Tensor]) -> None:
    """The residual stream adds up, and `hook_post` is what the MLP's last layer reads; a wrong place cannot do that."""
    towers = (("blocks", vlm.anatomy.text), ("vision.blocks", vlm.anatomy.vision))
    for prefix, tower in towers:
        for layer, block in enumerate(tower.blocks):
            name = f"{prefix}.{layer}"
            if f"{name}.hook_resid_post" not in taps:
                continue
            at = {leaf: taps[f"{name}.{leaf}"] for leaf in _EQUATIONS}
            last: Any = vlm.module(block.mlp_out)
            sums = {
                "hook_resid_mid": at["hook_resid_pre"] + at["hook_attn_out"],
                "hook_resid_post": at["hook_resid_mid"] + at["hook_mlp_out"],
                "hook_mlp_out": last.forward(at["mlp.hook_post"]),
            }
            for leaf, expected in sums.items():
                error = (at[leaf] - expected).abs().max().item()
                if not error <= tolerance(expected):
                    raise FrankenlensError(
                        f"self-check of {type(vlm.model).__name__}: {name}.{leaf} is not the sum that its name says "
                        f"(off by {error:.2e}); this architecture has another kind of block and is not supported yet."
                    )


def zero_every_point(vlm: Opened, inputs: Mapping[str, Any], progress: bool = True) -> dict[str, float]:
    """Zero each point in turn; name → largest change of a logit. Raises if one changes nothing."""
    changes = {}
    with _undisturbed(vlm), torch.no_grad():
        bare = _logits(vlm, inputs)
        for name in tqdm(
            vlm.hook_points, desc="zeroing every point", leave=False, delay=2, disable=not progress
        ):
            with vlm.hooks([(name, lambda activation, hook: torch.zeros_like(activation))]):
                logits = _logits(vlm, inputs)
            changes[name] = (logits - bare).abs().max().item()
    inert = [name for name, change in changes.items() if not change > 0]
    if inert:
        raise FrankenlensError(f"zeroing these points changes nothing: {', '.join(inert)}")
    return changes


def _logits(vlm: Opened, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos vocab"]:
    run: Any = vlm.model
    return run(**inputs, use_cache=False).logits


def _reason(vlm: Opened, name: str, fired: bool) -> str:
    if not fired:
        return "it does not fire in a forward pass with an image; this architecture computes it elsewhere."
    layer = getattr(vlm.model.config, "vision_feature_layer", None)
    if name.startswith("vision.") and layer not in (None, -1):
        return f"the projector reads hidden state {layer} of the vision tower (vision_feature_layer), not this one."
    return "no gradient of the logits reaches it: this architecture (or a zero gate in these weights) ignores it."


@contextmanager
def _undisturbed(vlm: Opened) -> Iterator[None]:
    """Evaluation mode, and afterwards the training flags and the M-RoPE offset that a forward pass leaves behind."""
    training = {module: module.training for module in vlm.model.modules()}
    stateful = [module for module in vlm.model.modules() if hasattr(module, "rope_deltas")]
    offsets = [module.rope_deltas for module in stateful]
    vlm.model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, offset in zip(stateful, offsets, strict=True):
            module.rope_deltas = offset
