"""Linear layers by oneDNN: the layers' own products but for rounding, only where that is meant, and never after."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hooks import linears
from hooks.linears import by_onednn, product

ROWS, WIDE, OUT = 64, 96, 48
pytestmark = pytest.mark.skipif(not linears._ONEDNN, reason="PyTorch without oneDNN")


@pytest.fixture
def layer() -> Iterator[nn.Linear]:
    found = nn.Linear(WIDE, OUT)
    yield found
    assert "forward" not in vars(found)


def _given(*lead: int) -> Tensor:
    return torch.randn(*lead, WIDE)


def _told(layer: nn.Module, given: Tensor) -> bool:
    """Whether oneDNN multiplies: told by its being another kernel's call, not by its numbers."""
    with torch.profiler.profile() as seen:
        layer(given)
    return any("_linear_pointwise" in event.key for event in seen.key_averages())


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_products_are_float64s(bias: bool) -> None:
    layer, given = nn.Linear(WIDE, OUT, bias=bias), _given(2, ROWS)
    exactly = given.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    with by_onednn([layer]):
        assert _told(layer, given)
        found = layer(given)
    assert (found - exactly).abs().max() <= 1e-5 * exactly.abs().max()
    lying = layer.weight.T.contiguous().T
    torch.testing.assert_close(product(given, lying, layer.bias), found, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_not_worth_it_or_not_plain_is_the_layers_own(layer: nn.Linear) -> None:
    few, strided = _given(linears.ROWS - 1), _given(ROWS).T.contiguous().T
    with by_onednn([layer]):
        assert _told(layer, _given(linears.STEP)) and _told(layer, _given(linears.ROWS + 1))
        for own in (few, strided, _given(), _given(0)):
            assert not _told(layer, own)
            assert torch.equal(layer(own), functional.linear(own, layer.weight, layer.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(_given(ROWS)).dtype == torch.bfloat16
        with torch.enable_grad():
            found = layer(_given(ROWS))
            assert found.requires_grad and torch.autograd.grad(found.sum(), layer.weight)[0].any()


@torch.no_grad()
def test_many_numbers_of_rows_are_few_products(layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps half a megabyte of code for every number of rows."""
    made: set[int] = set()

    def counted(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        made.add(len(x))
        return product(x, w, bias)

    monkeypatch.setattr(linears, "product", counted)
    layer = layer.requires_grad_(False)
    with by_onednn([layer]):
        for rows in range(linears.ROWS, 2048, 3):
            given = _given(rows)
            exactly = given.double() @ layer.weight.double().T + layer.bias.double()
            found = layer(given[None])
            assert found.shape == (1, rows, OUT) and found.is_contiguous()
            assert (found[0] - exactly).abs().max() <= 1e-5 * exactly.abs().max()
    assert len(made) <= 8 * 4 + 1 and all(0 <= one - rows <= rows / 8 for rows, one in _next(made))


def _next(made: set[int]) -> list[tuple[int, int]]:
    """Numbers of rows, and what they are rounded up to."""
    return [(rows, min(one for one in made if one >= rows)) for rows in range(linears.ROWS, max(made))]


@torch.no_grad()
def test_other_classes_and_other_types_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    wrapped = nn.Linear(WIDE, OUT)
    own_forward: Any = wrapped.forward
    wrapped.forward = lambda input: own_forward(input)  # as accelerate does where it offloads
    theirs = wrapped.forward
    half, other = nn.Linear(WIDE, OUT).bfloat16(), Own(WIDE, OUT)
    for layer in (wrapped, half, other):
        given = _given(ROWS).to(layer.weight.dtype)
        with by_onednn([layer]):
            assert not _told(layer, given)
    assert vars(wrapped)["forward"] is theirs
    plain = nn.Linear(WIDE, OUT)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False, raising=False)
    with by_onednn([plain]):
        assert "forward" not in vars(plain)


@torch.no_grad()
def test_hooks_on_a_layer_still_act_and_all_is_given_back_when_one_raises(layer: nn.Linear) -> None:
    given = _given(ROWS)
    with layer.register_forward_hook(lambda *io: torch.zeros_like(io[-1])), by_onednn([layer]):
        assert not layer(given).any()

    def breaks(*_: Any) -> None:
        raise KeyboardInterrupt

    with layer.register_forward_pre_hook(breaks), pytest.raises(KeyboardInterrupt), by_onednn([layer]):
        layer(given)
    assert "forward" not in vars(layer)
