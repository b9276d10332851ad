"""What weights hold of an update, against NumPy in float64; random updates of a norm that rounding does not change."""

import numpy as np
import pytest
import torch

from hooks.errors import FrankenlensError
from interp.updates import LEAST_COSINE, NORM_WITHIN, Realized, as_large, random_update, rounded
from tests.half_pairs import HALVES, nudged


def weights(dtype: torch.dtype, shape=(96, 64), seed: int = 0) -> torch.Tensor:
    """Of many sizes, as those of a model are."""
    return (0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def numpys(befores, afters, updates) -> tuple[float, float]:
    change = np.concatenate(
        [(a.double() - b.double()).flatten().numpy() for a, b in zip(afters, befores, strict=True)]
    )
    asked = np.concatenate([u.double().flatten().numpy() for u in updates])
    sizes = float(np.linalg.norm(change)), float(np.linalg.norm(asked))
    return sizes[0] / sizes[1], float(change @ asked) / sizes[0] / sizes[1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("times", [0.25, 0.5, 1.0, 2.0])
def test_norm_and_cosine_of_several_tensors_are_numpys(dtype, times: float) -> None:
    befores = [weights(dtype, shape, seed) for seed, shape in enumerate([(96, 64), (50,), (3, 20, 10)])]
    updates = [times * (nudged(w, seed=5).float() - w.float()) for w in befores]
    afters = [rounded(w, update) for w, update in zip(befores, updates, strict=True)]
    held = sum((Realized.of(*one) for one in zip(befores, afters, updates, strict=True)), Realized())
    norm, cosine = numpys(befores, afters, updates)
    assert held.norm_ratio == pytest.approx(norm, rel=1e-9)
    assert held.cosine == pytest.approx(cosine, rel=1e-9)
    fine = abs(norm - 1) <= NORM_WITHIN and cosine >= LEAST_COSINE
    assert fine == (times >= 1) == (held.lacking(dtype) == "")


def test_in_float32_all_of_an_update_is_held() -> None:
    own, update = weights(torch.float32), 1e-4 * weights(torch.float32, seed=1)
    held = Realized.of(own, rounded(own, update), update)
    assert held.norm_ratio == pytest.approx(1, abs=1e-3) and held.cosine > 1 - 1e-5
    assert held.lacking(torch.float32) == ""


def test_nothing_asked_for_is_held_by_nothing_and_lost_by_something() -> None:
    own, zero = weights(torch.bfloat16), torch.zeros(96, 64)
    assert (Realized.of(own, own, zero).norm_ratio, Realized.of(own, own, zero).cosine) == (1, 1)
    assert Realized().lacking(torch.bfloat16) == ""
    lost = Realized.of(own, own, zero + 1e-9)
    assert (lost.norm_ratio, lost.cosine) == (0, 0)
    assert "hold 0.00 of its norm" in lost.lacking(torch.bfloat16)
    assert Realized.of(own, nudged(own), zero).lacking(torch.bfloat16)


def test_a_refusal_names_the_update_the_type_and_the_ways_out() -> None:
    held = Realized(1.0, 0.25, 0.3, 10, 4, directed=True)
    words = r"a dose: weights in float16 hold 0\.50 of its norm .* cosine of 0\.60 .* tensors with 40% of the entries"
    with pytest.raises(FrankenlensError, match=words) as told:
        held.require("a dose", torch.float16, but="rounded=True")
    assert "--dtype float32" in str(told.value) and "rounded=True" in str(told.value)
    Realized(1.0, 1.1, 0.1, 9, 9).require("a random update", torch.float16)
    with pytest.raises(FrankenlensError, match="a directed one"):
        Realized(1.0, 1.1, 0.1, 9, 9, directed=True).require("a directed one", torch.float16)


def test_a_tensor_of_large_weights_does_not_speak_for_the_matrices() -> None:
    """Norm and cosine of all together are fine; the matrix, with all but all of the entries, holds nothing."""
    matrix, vector = weights(torch.bfloat16), torch.full((64,), 8.0).bfloat16()
    spread, step = torch.full((96, 64), 1e-6), torch.full((64,), 0.0625)
    held = Realized.of(matrix, rounded(matrix, spread), spread) + Realized.of(
        vector, rounded(vector, step), step
    )
    assert held.norm_ratio == pytest.approx(1, abs=0.02) and held.cosine > 0.98
    assert held.share == pytest.approx(64 / (64 + 96 * 64))
    assert "tensors with 1% of the entries" in held.lacking(torch.bfloat16)
    assert Realized.of(vector, rounded(vector, step), step).lacking(torch.bfloat16) == ""


def _asked(kind: str, own: torch.Tensor) -> torch.Tensor:
    delta = nudged(own, seed=3).float() - own.float()
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(4))
    return {
        "shuffled": random_update(delta, own.dtype, 1),
        "half of it": 0.5 * random_update(delta, own.dtype, 1),
        "a quarter": 0.25 * random_update(delta, own.dtype, 1),
        "spread": noise * 0.1 * delta.norm() / noise.norm(),
    }[kind]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["shuffled", "half of it", "a quarter", "spread"])
def test_random_updates_have_their_norm_however_they_round(dtype, kind: str) -> None:
    """The same updates, rounded as they are, miss it by a tenth or more: what this guards against."""
    own = weights(dtype)
    update = _asked(kind, own)
    norm = float(update.double().norm())
    made = as_large(own, update, 7)
    assert made.dtype == dtype and made.shape == own.shape
    assert float((made.double() - own.double()).norm()) == pytest.approx(norm, rel=0.03)
    assert abs(float((rounded(own, update).double() - own.double()).norm()) / norm - 1) > 0.1
    assert torch.equal(made, as_large(own, update, 7))


def test_what_hardly_rounds_is_left_bit_for_bit_and_nothing_stays_nothing() -> None:
    own, update = weights(torch.float32), 1e-3 * weights(torch.float32, seed=1)
    assert torch.equal(as_large(own, update, 0), own + update)
    half = weights(torch.bfloat16)
    assert torch.equal(as_large(half, torch.zeros(96, 64), 0), half)
    column = weights(torch.bfloat16).narrow(1, 3, 2)  # a view, as a head's columns are
    asked = random_update(nudged(column).float() - column.float(), torch.bfloat16, 2)
    found = float((as_large(column, asked, 0).float() - column.float()).norm())
    assert found == pytest.approx(float(asked.norm()), rel=0.05)
