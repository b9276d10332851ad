"""One thread in tests: small tensors gain nothing from more, and two cores may be shared."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from tests import typechecker

typechecker.install()  # before a module of the project is imported
torch.set_num_threads(1)
matplotlib.use("Agg")

HEAVIEST = (
    "test_notebooks.py",
    "test_readme.py",
    "planted/test_planted_claims.py",
    "planted/test_planted_pairs.py",
    "experiments/commands/test_planted.py",
    "test_installation.py",
    "interp/lockstep/test_lockstep.py",
    "experiments/commands/test_suite.py",
    "interp/sweep/test_sweep.py",
)
"""Files of few tests and many seconds, the longest first: begun last, one would keep a single core busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(HEAVIEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_runtest_setup() -> None:
    """A test's random numbers do not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _the_modes_of_torch_stay() -> Iterator[None]:
    """A generator that is left in the middle of `no_grad` leaves it on, or its end sets what is long over."""
    yield
    left = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert not left, "gradients were left off"


def pytest_collection_finish() -> None:
    """What the imports made stays; the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def pair() -> Iterator[Any]:
    """The pair that ships, opened for the tests of a file."""
    from experiments import embedded
    from interp.pair.pair import Pair

    opened = Pair.from_pretrained(embedded.path("in"), embedded.path("rl"))
    yield opened
    opened.close()
