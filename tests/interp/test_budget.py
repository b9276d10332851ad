"""One budget for all: a full device halves what runs at once, a limit makes it less, and no number depends on it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hooks import FrankenlensError
from hooks.memory import memory_limit
from tests.methods import METHODS, Asked, N, Numbers, differing, watched

LONG = ("component_map", "verify", "routes", "two_by_two", "path_effects", "ablate", "lockstep")
"""Whose limit is looked for with the slow tests alone."""


@pytest.fixture(scope="module")
def asked(pair) -> Asked:
    found = Asked(pair)
    assert len(found.decisions) == N and len(found.attributed.component) and len(found.first)
    return found


@pytest.fixture(scope="module")
def plain(asked: Asked) -> Callable[[str], tuple[Numbers, int]]:
    """What a method gives when there is room, and how many rows it ran at once."""
    known: dict[str, tuple[Numbers, int]] = {}

    def of(name: str) -> tuple[Numbers, int]:
        if name not in known:
            with watched(asked) as widest:
                known[name] = METHODS[name](asked), widest.rows
        return known[name]

    return of


def _full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _full_host() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "full"),
    [*((name, _full) for name in METHODS), ("sweep", _full_host), ("knockout", _full_host)],
)
def test_a_full_device_halves_what_runs_and_changes_no_number(
    name: str, full: Callable[[], None], asked: Asked, plain
) -> None:
    expected, at_once = plain(name)
    assert at_once > 2 and all(np.isfinite(values).any() for values in expected.values())
    with watched(asked, 2, full) as widest:
        found = METHODS[name](asked)
    assert widest.rows <= 2
    assert not differing(found, expected)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in METHODS]
)
def test_a_limit_runs_fewer_at_once_or_refuses_before_it_starts(name: str, asked: Asked, plain) -> None:
    """The least limit that is not refused, in steps of a fifth: with a fifth less nothing had run."""
    expected, at_once = plain(name)
    for power in range(40, 160):
        with memory_limit(int(2 ** (power / 4))), watched(asked) as widest:
            try:
                found = METHODS[name](asked)
                break
            except FrankenlensError as error:
                refusal = str(error)
            assert "for one prompt, beside the models, and" in refusal
            assert widest.rows == 0
    assert widest.rows < at_once
    assert not differing(found, expected)


def test_a_difference_would_be_seen(plain) -> None:
    expected, _ = plain("evaluate")
    assert not differing(expected, expected)
    off = {"value": expected["value"] * (1 + 1e-3)}
    assert "off by" in differing(off, expected)
