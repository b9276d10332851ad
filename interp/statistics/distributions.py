"""Divergences and entropies of next-token distributions: in float64, and never below 0.

In float32 the terms of KL(p || q) = sum p (log p - log q) cancel: between two models that are close to one another what
is left is rounding, of either sign. Here each term is p (e^d - 1 - d) with d = log q - log p, which is not negative;
as both sum to 1 the sum is the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TERMS_AT_ONCE = 1 << 23
"""Terms worked on together: half a dozen copies of them exist at once."""


def log_probabilities(logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n vocab"]:
    """Log-probabilities (nats, float64) of logits, or of log-probabilities that rounding left unnormalized."""
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
    return logits.double().log_softmax(-1)


def kl(p: Float[Tensor, "*n vocab"], q: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """KL(p || q) in nats, of log-probabilities in float64 (`log_probabilities`); 0 or more, infinite where q lacks what
    p has. Gradients flow into both.
    """
    q = q.to(p.device)
    if len(p.shape) > 1 and len(p) > 1 and p.numel() > TERMS_AT_ONCE:
        rows = max(1, TERMS_AT_ONCE * len(p) // p.numel())
        return torch.cat([kl(*some) for some in zip(p.split(rows), q.split(rows), strict=True)])
    share = p.exp()
    d = (q - p).masked_fill(share == 0, 0.0)  # -inf less -inf is no number, nor is its gradient
    near = d.clamp(-1, 1)
    terms = torch.where(d.abs() <= 1, share * (torch.expm1(near) - near), q.exp() - share * (1 + d))
    terms = torch.where(share == 0, q.exp(), terms)
    return terms.clamp(min=0).sum(-1)


def symmetric_kl(p: Float[Tensor, "*n vocab"], q: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """KL(p || q) + KL(q || p) in nats, as in `kl`."""
    return kl(p, q) + kl(q.to(p.device), p)


def entropy(logp: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """Entropy in nats of log-probabilities in float64; 0 or more."""
    return torch.special.entr(logp.exp()).sum(-1).clamp(min=0)
