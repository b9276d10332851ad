"""What a comparison is planned to compute, against the products and decompositions that it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import embedded
from interp.comparison import compare
from interp.comparison.directions import _angles
from interp.comparison.passes import Passes
from interp.comparison.subspace import Leading
from interp.plan.structure import weightless
from interp.plan.weights import ComparisonPlan, passes


class Asked:
    """Operations of products with a matrix, and of decompositions by the counts of Golub & Van Loan, 8.6."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total = 0.0
        for name in ("gram_times", "times", "gram"):
            monkeypatch.setattr(Passes, name, self._product(name, getattr(Passes, name)))
        for name in ("svdvals", "svd", "eigvalsh"):
            monkeypatch.setattr(torch.linalg, name, self._decomposition(name, getattr(torch.linalg, name)))

    def _product(self, name: str, own: Any) -> Any:
        def asked(passes: Passes, given: Any, *more: Any) -> Any:
            entries = sum(block.numel() for block in passes._blocks())
            columns = {"gram": passes.short / 2, "times": 1, "gram_times": 2}[name]
            self.total += 2 * entries * columns * (1 if name == "gram" else given.shape[1])
            return own(passes, given, *more)

        return asked

    def _decomposition(self, name: str, own: Any) -> Any:
        def asked(matrix: Tensor, *more: Any, **settings: Any) -> Any:
            m, n = max(matrix.shape), min(matrix.shape)
            counts = {"svdvals": 4 * m * n**2 - 4 / 3 * n**3, "eigvalsh": 4 / 3 * n**3}
            counts["svd"] = min(6 * m * n**2 + 20 * n**3, 14 * m * n**2 + 8 * n**3)
            self.total += counts[name]
            return own(matrix, *more, **settings)

        return asked


def test_operations_of_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    compare(*(embedded.path(one) for one in ("in", "rl", "base")), subspace=16, progress=False)
    plan = ComparisonPlan(weightless(embedded.path("in")), 3, 16)
    planned = plan.spectra().flops + plan.subspaces().flops
    assert planned == pytest.approx(asked.total, rel=0.25)


@pytest.mark.parametrize(("power", "off"), [(0.5, 0.05), (1.0, 0.4)])
def test_operations_of_a_search_for_subspaces(
    monkeypatch: pytest.MonkeyPatch, power: float, off: float
) -> None:
    """Singular values that fall as a power, as those of trained weights do: how many steps they take is not planned."""
    shape, drawn = (1536, 1024), torch.Generator().manual_seed(0)
    far, near = (torch.linalg.qr(torch.randn(n, shape[1], generator=drawn))[0] for n in shape)
    before = far * torch.arange(1, shape[1] + 1) ** -power @ near.T
    after = before + 1e-4 * before.std() * torch.randn(shape, generator=drawn)
    asked = Asked(monkeypatch)
    both = [Leading(lambda one=one: iter(one.split(256)), shape, 16) for one in (before, after)]
    _angles(*both)
    assert 2 * passes(*shape, 16) == pytest.approx(asked.total, rel=off)


def test_bytes_read() -> None:
    plan = ComparisonPlan(weightless(embedded.path("in")), 3, 16)
    size = sum(one.nbytes for one in nn.Module.parameters(weightless(embedded.path("in")).model))
    assert plan.hashes().disk == 3 * size
    assert 3 * size <= plan.norms().disk <= 6 * size
