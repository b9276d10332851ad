"""A shared prefix and a segment, joined, against one softmax over all keys of each lane."""

import pytest
import torch

from interp.sweep.attention import SegmentContext, _shared_prefix, _with_copies
from interp.sweep.joined import can_join, joined

ROWS, COPIES, BEFORE, N = 2, 3, 37, 11


def triangle(rows: int = 1) -> torch.Tensor:
    ones = torch.ones(N, BEFORE + N, dtype=torch.bool).tril(BEFORE)
    return ones[None, None].repeat(rows, 1, 1, 1)


def windowed() -> torch.Tensor:
    """Each token sees itself and eight before it."""
    return triangle() & ~torch.ones(N, BEFORE + N, dtype=torch.bool).tril(BEFORE - 9)


def padded_left() -> torch.Tensor:
    """The second row begins within the segment: its first queries see nothing at all."""
    seen = triangle(ROWS)
    seen[1, :, :, : BEFORE + 4] = False
    return seen


def cut() -> torch.Tensor:
    """Each lane hides keys of its own; one hides all of the prefix."""
    seen = triangle(ROWS * COPIES)
    seen &= torch.rand(ROWS * COPIES, 1, N, BEFORE + N, generator=torch.Generator().manual_seed(3)) < 0.6
    seen[4, :, :, :BEFORE] = False
    return seen


SEEN = {
    "all before": triangle(),
    "a window": windowed(),
    "padding on the left": padded_left(),
    "cuts": cut(),
    "the segment alone": triangle() & (torch.arange(BEFORE + N) >= BEFORE),
}


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("last_only", [False, True])
def test_it_is_one_softmax_over_all_keys(kind: str, kv_heads: int, last_only: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, keys, values = (
        torch.randn(lanes, heads, n, 16, generator=generator) * size
        for lanes, heads, n, size in (
            (ROWS * COPIES, 4, N, 3), (ROWS * COPIES, kv_heads, N, 3), (ROWS * COPIES, kv_heads, N, 1),
            (ROWS, kv_heads, BEFORE, 3), (ROWS, kv_heads, BEFORE, 1),
        )
    )  # fmt: skip
    visible = SEEN[kind]
    if last_only:
        query, visible = query[:, :, -2:], visible[:, :, -2:]
    assert can_join(query, value)
    assert not can_join(query.bfloat16(), value.bfloat16())
    assert not can_join(query, value[..., :8])
    found = joined(query, (key, value), (keys, values), visible, kind == "all before", 0.3)
    all_keys = torch.cat([keys.repeat(COPIES, 1, 1, 1), key], dim=2).repeat_interleave(4 // kv_heads, dim=1)
    all_values = torch.cat([values.repeat(COPIES, 1, 1, 1), value], 2).repeat_interleave(4 // kv_heads, 1)
    seen = visible if len(visible) in (1, ROWS * COPIES) else visible.repeat(COPIES, 1, 1, 1)
    scores = (query @ all_keys.transpose(2, 3) * 0.3).double().masked_fill(~seen, -torch.inf)
    wanted = scores.softmax(-1).nan_to_num(nan=0.0) @ all_values.double()
    assert (found - wanted).abs().max() <= 1e-5
    context = SegmentContext(keys, values, visible, kind == "all before")
    for other in (
        _shared_prefix(context, query, key, value, visible, 0.3),
        _with_copies(context, query, key, value, 0.3, dense=False),
        _with_copies(context, query, key, value, 0.3, dense=True),
    ):  # in half precisions, on other devices, and where the pattern is looked at
        assert (other - wanted).abs().max() <= 1e-5
    near = scores[..., BEFORE:].softmax(-1).nan_to_num(nan=0.0) @ all_values[:, :, BEFORE:].double()
    if seen[..., :BEFORE].any():
        assert (near - wanted).abs().max() > 100 * 1e-5


def test_a_window_hides_some_of_the_prefix_only() -> None:
    seen = windowed()[0, 0]
    assert not seen[:, 0].any()
    assert seen[0, :BEFORE].any()
    assert seen.diagonal(BEFORE).all()
    assert (seen <= triangle()[0, 0]).all()
