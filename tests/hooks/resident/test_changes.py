"""What differs between two tensors, kept so that it turns either into the other, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooks.resident import as_bits, change, size_of

N = 10_007  # no multiple of eight


def two(share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors that differ in about so many of their entries, in any of their bits."""
    one = torch.randn(N).to(dtype)
    other = one.clone()
    bits = as_bits(other)
    at = torch.rand(N) < share
    bits[at] ^= torch.randint(1, 120, (int(at.sum()),)).to(bits.dtype)
    return one, other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.9, 1.0])
def test_a_turn_makes_the_other_and_the_next_the_one(dtype: torch.dtype, share: float) -> None:
    one, other = two(share, dtype)
    made = one.clone()
    found = change(as_bits(one), as_bits(other))
    if found is None:
        assert torch.equal(one, other) and share == 0
        return
    found.turn(as_bits(made))
    assert torch.equal(as_bits(made), as_bits(other))
    found.turn(as_bits(made))
    assert torch.equal(as_bits(made), as_bits(one))


def test_what_no_comparison_of_numbers_sees_is_turned_too() -> None:
    """-0.0 equals 0.0, and NaN equals nothing, another NaN's payload least of all."""
    one = torch.tensor([0.0, 1.0, float("nan"), float("inf"), 5e-324], dtype=torch.float64)
    other = one.clone()
    other[0] = -0.0
    as_bits(other)[2] += 1
    assert torch.equal(one[[0, 1, 3, 4]], other[[0, 1, 3, 4]])
    found = change(as_bits(one), as_bits(other))
    assert found is not None
    found.turn(as_bits(one))
    assert torch.equal(as_bits(one), as_bits(other))


@pytest.mark.parametrize(
    ("share", "itemsize", "expected"),
    [
        (0.2, 2, 1 / 16 + 0.2),  # one bit an entry, and the changed ones
        (0.2, 4, 1 / 32 + 0.2),
        (0.01, 2, 0.01 * (1 + 4 / 2)),  # a place of four bytes for each
        (1.0, 2, 1.0),  # all of them, unnamed
        (0.0, 2, 0.0),
    ],
)
def test_changes_take_what_their_formula_says(share: float, itemsize: int, expected: float) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    one, other = two(share, dtype)
    counted = int((as_bits(one) != as_bits(other)).sum()) / N
    found = change(as_bits(one), as_bits(other))
    assert size_of(share, N, itemsize) == pytest.approx(expected * N * itemsize, rel=1e-3)
    assert (0 if found is None else found.nbytes) == size_of(counted, N, itemsize)
