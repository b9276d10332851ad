"""Updates that are products of two thin matrices, s B A, measured without forming the product.

With thin decompositions B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of R_B R_A^T, a matrix of
the rank's size, and the scalar product of two such updates is the sum over (B_1^T B_2) * (A_1 A_2^T).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.comparison.singular_values import Spectrum


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update scaling · B A of a matrix.

    Attributes:
        b: as they are stored, in any floating type.
        a: the same.
        scaling: e.g. alpha / r.
    """

    b: Float[Tensor, "row rank"]
    a: Float[Tensor, "rank column"]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Columns of B; the product's own rank is this at most (`n_directions`)."""
        return self.a.shape[0]

    def part(self, dim: int | None, start: int = 0, length: int = 0) -> LowRank:
        """Rows (dim 0) or columns (dim 1) of the update, which are those of B or A; None is all of it."""
        if dim is None:
            return self
        b = self.b.narrow(0, start, length) if dim == 0 else self.b
        a = self.a.narrow(1, start, length) if dim == 1 else self.a
        return LowRank(b, a, self.scaling)

    def singular_values(self) -> Float[np.ndarray, " rank"]:
        """Those that can differ from 0, descending, in float64."""
        return torch.linalg.svdvals(self._core()).numpy() * abs(self.scaling)

    def squares(self) -> float:
        """The squared Frobenius norm; the core is as large as the product, so that nothing cancels."""
        return float(self._core().square().sum()) * self.scaling**2

    def n_directions(self) -> int:
        """The rank of the product in float64, by the tolerance of `numpy.linalg.matrix_rank`."""
        values = self.singular_values()
        return int((values > values[0] * max(self.shape) * np.finfo(float).eps).sum())

    def spectrum(self) -> Spectrum:
        """All singular values of the product, the zeros among them."""
        values = self.singular_values()[: min(self.shape)]
        whole = np.zeros(min(self.shape))
        whole[: len(values)] = values
        return Spectrum(whole, np.ones(len(whole), dtype=bool), "low rank")

    def inner(self, other: LowRank) -> float:
        """The scalar product with another update of the same matrix, in float64."""
        left = self.b.double().T @ other.b.double()
        right = self.a.double() @ other.a.double().T
        return float((left * right).sum()) * self.scaling * other.scaling

    def inner_dense(self, other: Float[Tensor, "row column"]) -> float:
        """The scalar product with an update that is no product, in float64."""
        return float((self.b.double() * (other.double() @ self.a.double().T)).sum()) * self.scaling

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Float[Tensor, "some column"]:
        """Some rows of the product, formed."""
        return (self.b[first:last].to(dtype) * self.scaling) @ self.a.to(dtype)

    def columns(self, first: int, last: int, dtype: torch.dtype) -> Float[Tensor, "some row"]:
        """Some columns of the product, formed and transposed."""
        return self.a[:, first:last].to(dtype).T @ (self.b.to(dtype) * self.scaling).T

    def _core(self) -> Float[Tensor, "_ _"]:
        left, right = (torch.linalg.qr(one.double(), mode="r").R for one in (self.b, self.a.T))
        return left @ right.T
