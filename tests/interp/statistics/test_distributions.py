"""KL and entropy against SciPy in float64; never negative where float32 is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy as scipys_entropy

from interp.statistics.distributions import entropy, kl, log_probabilities, symmetric_kl


def _logits(seed: int, scale: float, n: int = 4000) -> torch.Tensor:
    return scale * torch.randn(3, n, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 30), st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0]))
def test_kl_is_scipys_and_not_negative(seed: int, scale: float, apart: float) -> None:
    one = _logits(seed, scale, 50)
    both = one, one + apart * _logits(seed + 1, 1.0, 50)
    p, q = (log_softmax(some.double().numpy(), axis=-1) for some in both)
    expected = rel_entr(np.exp(p), np.exp(q)).sum(-1)
    found = kl(*map(log_probabilities, both))
    assert found.dtype == torch.float64 and bool((found >= 0).all())
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    back = rel_entr(np.exp(q), np.exp(p)).sum(-1)
    np.testing.assert_allclose(
        symmetric_kl(*map(log_probabilities, both)), expected + back, rtol=1e-9, atol=1e-13
    )
    np.testing.assert_allclose(entropy(log_probabilities(one)), scipys_entropy(np.exp(p), axis=-1), atol=1e-9)


def test_models_close_to_one_another_have_a_kl_that_float32_loses() -> None:
    one = _logits(0, 3.0, 150_000)
    other = one + 1e-4 * _logits(1, 1.0, 150_000)
    p, q = (some.log_softmax(-1) for some in (one, other))
    naive = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    found = kl(*map(log_probabilities, (one, other)))
    second_order = 0.5 * (p.double().exp() * (one.double() - other.double()).square()).sum(-1)
    np.testing.assert_allclose(found, second_order, rtol=0.05)
    assert bool((found > 0).all()) and float(((naive.double() - found) / found).abs().max()) > 1


def test_words_that_are_ruled_out() -> None:
    """-inf in both counts for nothing, in q alone for infinitely much, in p alone for what q has."""
    logits = _logits(0, 1.0, 9)
    masked = logits.clone()
    masked[:, :2] = -torch.inf
    p, q = log_probabilities(masked), log_probabilities(masked + _logits(1, 1.0, 9))
    inside = slice(2, None)
    np.testing.assert_allclose(
        kl(p, q), kl(*map(log_probabilities, (p[:, inside], q[:, inside]))), rtol=1e-12
    )
    full = log_probabilities(logits)
    assert bool(torch.isinf(kl(full, p)).all())
    np.testing.assert_allclose(kl(p, full), rel_entr(p.exp().numpy(), full.exp().numpy()).sum(-1), rtol=1e-9)
    assert float(entropy(log_probabilities(torch.tensor([0.0, -torch.inf])))) == 0


def test_gradients_are_those_of_kl() -> None:
    logits = _logits(3, 5.0, 30).requires_grad_()
    target = log_probabilities(_logits(4, 5.0, 30))
    (found,) = torch.autograd.grad(kl(target, log_probabilities(logits)).sum(), logits)
    np.testing.assert_allclose(found, logits.detach().softmax(-1) - target.exp().float(), atol=1e-6)
    half = logits.detach().bfloat16()
    assert torch.equal(log_probabilities(half), half.double().log_softmax(-1))
    assert float(kl(log_probabilities(half), log_probabilities(half)).abs().max()) == pytest.approx(0, abs=0)


def test_gradients_pass_words_that_are_ruled_out() -> None:
    """They are those of the other words alone, by PyTorch's own divergence."""
    logits = _logits(0, 1.0, 9)
    logits[:, :2] = -torch.inf
    leaf = (logits + _logits(1, 0.3, 9)).requires_grad_()
    kl(log_probabilities(logits), log_probabilities(leaf)).sum().backward()
    inside = leaf.detach()[:, 2:].double().requires_grad_()
    p = log_probabilities(logits)[:, 2:]
    torch.nn.functional.kl_div(inside.log_softmax(-1), p, reduction="sum", log_target=True).backward()
    assert leaf.grad is not None and inside.grad is not None
    np.testing.assert_allclose(leaf.grad[:, 2:], inside.grad, atol=1e-6)
    assert bool((leaf.grad[:, :2] == 0).all()) and float(inside.grad.abs().max()) > 1e-2
