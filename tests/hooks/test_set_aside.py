"""Weights that are put into a model that there is no second one's memory for: its own are in a file meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks import FrankenlensError
from hooks.memory import memory_limit
from hooks.spilled import Spill, Spilled
from hooks.swapped import _OPEN, Aside, swapped
from interp.decision import changed_weights, null_changes
from interp.pair.pair import Pair


class Odd(nn.Module):
    """Parameters of every shape and half precision, one of them laid out in columns, and numbers that are none."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        wide = torch.randn(40, 6, generator=generator)
        wide[3, 2], wide[5, 5], wide[7, 1] = torch.nan, torch.inf, -0.0
        self.wide = nn.Parameter(wide)
        self.short = nn.Parameter(torch.randn(5, 3, 2, generator=generator).bfloat16())
        self.columns = nn.Parameter(torch.randn(8, 9, generator=generator).T)
        self.one = nn.Parameter(torch.tensor(2.5))
        self.none = nn.Parameter(torch.zeros(0, 4))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: p.detach().contiguous().view(-1).view(torch.uint8).clone() for n, p in model.named_parameters()
    }


def others(model: nn.Module, fail: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    for name, parameter in model.named_parameters():
        if name == fail:
            raise KeyboardInterrupt
        yield parameter, torch.full_like(parameter, 3.0)


@pytest.mark.parametrize("most", [0, 10_000])
@pytest.mark.parametrize("part", [1, 1 << 26])
def test_what_was_set_aside_is_there_again_bit_for_bit(
    most: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooks.swapped.PART", part)
    model = Odd()
    before, places = bits(model), [one.data_ptr() for one in model.parameters()]
    with swapped(model, lambda: others(model), "a test", Spill(most)):
        assert all(bool((one == 3.0).all()) for one in model.parameters())
        (swap,) = _OPEN[model]
        kept = [data._kept for _, data in swap.own if isinstance(data, Aside)]
        assert len(kept) == 5
        assert sum(isinstance(one, Spilled) for one in kept) == (0 if most else 4)  # one holds nothing
        with swapped(model, lambda: [(model.one, torch.tensor(7.0))], "inside"):
            assert float(model.one.detach()) == 7.0
        assert float(model.one.detach()) == 3.0
    assert all(torch.equal(one, before[name]) for name, one in bits(model).items())
    assert [one.data_ptr() for one in model.parameters()] == places


def test_a_change_that_is_broken_off_leaves_the_model_as_it_was() -> None:
    model = Odd()
    before = bits(model)
    with (
        pytest.raises(KeyboardInterrupt),
        swapped(model, lambda: others(model, "columns"), "a test", Spill(0)),
    ):
        pass
    assert all(torch.equal(one, before[name]) for name, one in bits(model).items())


def test_where_the_disk_is_full_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, spill, written = Odd(), Spill(0, "the weights"), []
    before = bits(model)
    keep = Spill.keep

    def full(self: Spill, states: Tensor) -> Any:
        written.append(states)
        if len(written) == 3:
            raise FrankenlensError("the weights need more than the disk holds")
        return keep(self, states)

    monkeypatch.setattr(Spill, "keep", full)
    with (
        pytest.raises(FrankenlensError, match="the weights need more"),
        swapped(model, lambda: others(model), "a test", spill),
    ):
        pass
    assert all(torch.equal(one, before[name]) for name, one in bits(model).items())


def test_pairs_that_learnt_nothing_are_the_same_in_little_memory(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (vlm, change) = null_changes(pair)["random"]
    own = bits(vlm.model)
    with changed_weights(vlm.model, change):
        whole = bits(vlm.model)
        assert not any(isinstance(data, Aside) for _, data in _OPEN[vlm.model][0].own)
    monkeypatch.setattr("interp.decision.null_pairs.NOT_WORTH_ASKING", 0)
    with memory_limit("1MiB"), changed_weights(vlm.model, change):
        assert all(isinstance(data, Aside) for _, data in _OPEN[vlm.model][0].own)
        assert all(torch.equal(one, whole[name]) for name, one in bits(vlm.model).items())
    assert all(torch.equal(one, own[name]) for name, one in bits(vlm.model).items())
    assert sum(not torch.equal(one, whole[name]) for name, one in own.items()) > len(own) // 2
