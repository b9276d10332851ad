"""The model's own way from a residual stream to logits: final norm, unembedding, and what is done to logits after it.

Soft-capping (Gemma, PaliGemma) and scaled heads (Granite divides, Cohere and HyperCLOVA X multiply) are applied after
the unembedding, inside the `forward` of the whole model. Which of them this model applies is found from its config and
proved, bit for bit, on every run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks import FrankenlensError, HookedVLM
from hooks.plain import own_parameter
from hooks.selfcheck import tolerance

_SCALES = ("logits_scaling", "logit_scale")
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class PostHead:
    """What is done to the unembedding's output: divided, multiplied, capped; in float32 where `wide`."""

    divisor: float | None = None
    factor: float | None = None
    cap: float | None = None
    wide: bool = False

    def __call__(self, raw: Float[Tensor, "*lead vocab"]) -> Float[Tensor, "*lead vocab"]:
        """The model's logits."""
        logits = self.scaled(raw)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def scaled(self, raw: Float[Tensor, "*lead vocab"]) -> Float[Tensor, "*lead vocab"]:
        """The linear part alone: logits before soft-capping."""
        logits = raw.float() if self.wide else raw
        logits = logits if self.divisor is None else logits / self.divisor
        return logits if self.factor is None else logits * self.factor

    @property
    def scale(self) -> float:
        """What the linear part multiplies by."""
        return (self.factor or 1.0) / (self.divisor or 1.0)

    def __str__(self) -> str:
        parts = [f"divided by {self.divisor:g}"] if self.divisor is not None else []
        parts += [f"multiplied by {self.factor:g}"] if self.factor is not None else []
        parts += [f"soft-capped at {self.cap:g}"] if self.cap is not None else []
        return ", ".join(parts) or "as they are"


@dataclass(frozen=True)
class OutputHead:
    """Residual stream → logits, by the model's own modules.

    Attributes:
        norm: the final norm.
        unembed: the unembedding.
        after: what the model does to the unembedding's output.
    """

    norm: nn.Module
    unembed: nn.Module
    after: PostHead = PostHead()

    def __call__(self, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead vocab"]:
        """Logits of a residual stream; bit for bit the model's own for the one after the last block, in its shape."""
        return self.after(self.unembed(self.norm(resid)))

    def snapshot(self) -> OutputHead:
        """With copies of the weights, for when the model's are about to change."""
        return replace(self, norm=copy.deepcopy(self.norm), unembed=copy.deepcopy(self.unembed))


def head_of(vlm: HookedVLM, raw: Tensor, logits: Tensor) -> OutputHead:
    """The head of a model, of whose output `raw` (of the unembedding) and `logits` (of the model) are known.

    Raises:
        FrankenlensError: no scaling or capping that the config names makes the one of the other, bit for bit.
    """
    for after in _candidates(vlm):
        if _same(after(raw), logits):
            norm, unembed = vlm.module(vlm.anatomy.final_norm), vlm.module(vlm.anatomy.unembed)
            return OutputHead(norm, unembed, after)
    tried = "; ".join(dict.fromkeys(str(after) for after in _candidates(vlm)))
    raise FrankenlensError(
        f"{type(vlm.model).__name__} does something to its logits after the unembedding that is not known here (tried, "
        f"bit for bit: {tried}), so a lens would not show what the model computes. Known are "
        f"{', '.join((*_SCALES, *_CAPS))} of the text config."
    )


def verify(head: OutputHead, last: Tensor, columns: Tensor | slice, logits: Tensor) -> None:
    """The lens of the last residual stream is the model's own output, in the shapes in which the model made it.

    Raises:
        FrankenlensError: a bit differs.
    """
    own = head.after(head.unembed(head.norm(last)[:, columns]))
    if not _same(own, logits):
        off = (own - logits).abs().max().item() if own.shape == logits.shape else float("nan")
        raise FrankenlensError(
            f"final norm and unembedding, applied to the residual stream after the last block, are off the model's own "
            f"logits by {off:.1e}: this architecture puts something else between them, and a lens would be wrong. "
            "Are hooks on that edit the final norm or the unembedding?"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    b = b.to(a.device)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _candidates(vlm: HookedVLM) -> Iterator[PostHead]:
    config = vlm.model.config
    owners = (config.get_text_config(), config, vlm.model)
    scales, caps = _numbers(owners, _SCALES), _numbers(owners, _CAPS)
    linear = [(None, None), *((s, None) for s in scales), *((None, s) for s in scales)]
    for wide, cap, (divisor, factor) in product((False, True), (None, *caps), linear):
        yield PostHead(divisor, factor, cap, wide)


def _numbers(owners: tuple[Any, ...], names: tuple[str, ...]) -> list[float]:
    found = [getattr(owner, name, None) for owner in owners for name in names]
    return list(dict.fromkeys(v for v in found if isinstance(v, int | float) and v))


@dataclass(frozen=True)
class FrozenNorm:
    """The final norm as a linear map, its scale held at what it was on a run.

    N(x) = scale * gain * (x - mean(x) if centred) + bias.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    scale: Float[Tensor, " token"]
    centred: bool

    def directions(self, rows: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """What a residual vector is multiplied with to give its part of <N(x), rows>; the bias is apart."""
        folded = rows * self.gain * self.scale[:, None]
        return folded - folded.mean(-1, keepdim=True) if self.centred else folded


def freeze(norm: nn.Module, resid: Float[Tensor, "token d_model"]) -> FrozenNorm:
    """The norm linearized at a residual stream, in float64; found from the module and proved on its own output.

    Raises:
        FrankenlensError: it is neither a layer norm nor an RMS norm with gain g or 1 + g.
    """
    normed = norm(resid).double()
    weight = own_parameter(norm, "weight")
    if weight is not None:
        gain, x = weight.detach().double().to(resid.device), resid.double()
        own_bias = own_parameter(norm, "bias")
        bias = torch.zeros_like(gain) if own_bias is None else own_bias.detach().double().to(resid.device)
        centred = isinstance(norm, nn.LayerNorm)
        x = x - x.mean(-1, keepdim=True) if centred else x
        for g in (gain, 1 + gain):  # Gemma's is 1 + weight
            shape = g * x
            scale = ((normed - bias) * shape).sum(-1) / shape.square().sum(-1).clamp(min=1e-300)
            error = (scale[:, None] * shape + bias - normed).abs().max().item()
            if error <= tolerance(normed.to(resid.dtype)):
                return FrozenNorm(g, bias, scale, centred)
    raise FrankenlensError(
        f"the final norm ({type(norm).__name__}) is neither a layer norm nor an RMS norm with a gain, so no logit "
        "can be attributed through it."
    )
