"""What an update that means nothing would look like: a Gaussian of the same norm, and rounding to bfloat16."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import scipy.linalg
import torch

from hooks.stored.checkpoint import Checkpoint
from interp.comparison.singular_values import Spectrum

RUNS, LENGTH = 16, 1 << 13
"""Evenly spaced runs of neighbouring entries that stand for a tensor with more entries than they have together."""
_DIGITS = 8  # significant bits of bfloat16


@cache
def gaussian_spectrum(rows: int, columns: int, seed: int = 0) -> Spectrum:
    """Singular values of a matrix of independent standard normal entries, one draw.

    Drawn from their exact distribution, that of a bidiagonal matrix of chi variables (Dumitriu & Edelman 2002), so
    that 7B's largest matrices take a second. Ranks and log(σ_i / σ_1) do not depend on the norm.
    """
    short, long = sorted((rows, columns))
    draw = np.random.default_rng([seed, short, long])
    steps = np.arange(short)
    between = np.empty(2 * short - 1)  # Golub and Kahan's tridiagonal form: eigenvalues are ±σ
    between[::2] = np.sqrt(draw.chisquare(long - steps))
    between[1::2] = np.sqrt(draw.chisquare(short - 1 - steps[:-1]))
    found = scipy.linalg.eigvalsh_tridiagonal(np.zeros(2 * short), between, lapack_driver="sterf")
    values = np.abs(found[::-1][:short])
    return Spectrum(values, values >= 1e-9 * values[0], "tridiagonal")


@torch.no_grad()
def rounding(
    before: Checkpoint, name: str, norm: float, seed: int = 0, kind: torch.dtype = torch.bfloat16
) -> dict[str, float]:
    """What rounding does to a tensor, from a sample of its entries (131,072, or all).

    Args:
        before: the weights that were updated.
        name: the tensor.
        norm: of the update.
        seed: of the random update.
        kind: the type in which values count as unchanged.

    Returns:
        rounding_norm: of the change that rounding to bfloat16 makes to weights evenly spread between two neighbours,
        sqrt(Σ gap² / 12); sparsity_random: share of entries with the same value, in that type, before and after a
        Gaussian update of that norm.
    """
    weights = before.sample(name, RUNS, LENGTH).double()
    gaps = torch.where(weights == 0, 0, torch.exp2(torch.frexp(weights).exponent.double() - _DIGITS))
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    n = before.tensors[name].entries
    noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64) * (norm / n**0.5)
    same = (weights + noise).to(kind) == weights.to(kind)
    return {
        "rounding_norm": float((n * gaps.square().mean() / 12).sqrt()),
        "sparsity_random": float(same.double().mean()),
    }
