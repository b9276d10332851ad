"""Student's t and Hall's t of a mean, or of a ratio of sums, over independent units; many cells at once.

The mean of d = x - r y over units is tested against 0: for y = 1 the mean of x against r, otherwise the ratio
sum(x) / sum(y) against r (Fieller). Beside Student's t stands Hall's transform of it, which removes the first-order
effect of skewness (Hall, "On the removal of skewness by transformation", JRSS B 1992). Where Hall's says less, it
counts; where it says more, a part of the difference does (`more`). Small samples show less skewness than there is, so
it enters more than once (`skew`). Both numbers come from simulation.

A unit is what was drawn independently: an example, or a cluster of examples (those of one image), whose x and y are
then sums over the cluster. A mean over examples in clusters is the ratio of their sums to their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


@dataclass(frozen=True)
class Moments:
    """Of x and y over the units of each cell: numbers, means, central moments.

    Attributes:
        n: units.
        x, y: means.
        second: of xx, xy, yy.
        third: of xxx, xxy, xyy, yyy.
    """

    n: Int[np.ndarray, "*cells"]
    x: Float[np.ndarray, "*cells"]
    y: Float[np.ndarray, "*cells"]
    second: tuple[Float[np.ndarray, "*cells"], ...]
    third: tuple[Float[np.ndarray, "*cells"], ...]

    @classmethod
    def of(
        cls,
        x: Float[np.ndarray, "*cells unit"],
        y: Float[np.ndarray, "*cells unit"],
        there: Bool[np.ndarray, "*cells unit"],
    ) -> Moments:
        """Of what is there; the rest is ignored, NaN too."""
        n = there.sum(-1)
        size = np.maximum(n, 1)
        x, y = np.where(there, x, 0.0), np.where(there, y, 0.0)
        means = x.sum(-1) / size, y.sum(-1) / size
        x, y = (np.where(there, own - mean[..., None], 0.0) for own, mean in zip((x, y), means, strict=True))
        xx, xy, yy = x * x, x * y, y * y
        second = tuple(own.sum(-1) / size for own in (xx, xy, yy))
        third = tuple(
            np.einsum("...u,...u->...", a, b) / size for a, b in ((xx, x), (xx, y), (yy, x), (yy, y))
        )
        return cls(n, *means, second, third)

    def __getitem__(self, cells: Int[np.ndarray, " some"]) -> Moments:
        pick = (tuple(one[cells] for one in own) for own in (self.second, self.third))
        return Moments(self.n[cells], self.x[cells], self.y[cells], *pick)

    def studentised(
        self, r: Float[np.ndarray, "*cells"] | float, skew: float
    ) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
        """Student's t of x - r y against 0, and Hall's transform of it, skewness entering `skew` times.

        NaN where nothing varies or n < 3.
        """
        size = np.maximum(self.n, 3)
        xx, xy, yy = self.second
        xxx, xxy, xyy, yyy = self.third
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            variance = xx - 2 * r * xy + r**2 * yy
            scale = xx + r**2 * yy
            variance = np.where((variance > 1e-12 * scale) & (self.n > 2), variance, np.nan)
            third = (xxx - 3 * r * xxy + 3 * r**2 * xyy - r**3 * yyy) / variance**1.5
            student = (self.x - r * self.y) / np.sqrt(variance) * np.sqrt(size - 1)
            return student, hall(student, skew * third, size)


def hall(
    student: Float[np.ndarray, "*cells"], skew: Float[np.ndarray, "*cells"], n: Int[np.ndarray, "*cells"]
) -> Float[np.ndarray, "*cells"]:
    """Hall's transform of Student's t of n values whose (biased) sample skewness is given."""
    k = skew * np.sqrt(n * (n - 1)) / np.maximum(n - 2, 1)
    small = student / np.sqrt(n)
    return np.sqrt(n) * (small + k * small**2 / 3 + k**2 * small**3 / 27 + k / (6 * n))


def summed(
    x: Float[np.ndarray, "*cells example"],
    y: Float[np.ndarray, "*cells example"],
    clusters: Shaped[np.ndarray, " example"] | None,
) -> tuple[
    Float[np.ndarray, "*cells unit"], Float[np.ndarray, "*cells unit"], Bool[np.ndarray, "*cells unit"]
]:
    """x and y summed over each cluster's examples that have both, and which clusters have any."""
    there = ~(np.isnan(x) | np.isnan(y))
    x, y = np.where(there, x, 0.0), np.where(there, y, 0.0)
    if clusters is None:
        return x, y, there
    names, own = np.unique(np.asarray(clusters), return_inverse=True)
    if len(own) != x.shape[-1]:
        raise ValueError(f"{len(own)} names of clusters for {x.shape[-1]} examples")
    if len(names) == len(own):
        return x, y, there
    member = np.zeros((x.shape[-1], len(names)))
    member[np.arange(len(own)), np.ravel(own)] = 1
    return x @ member, y @ member, there.astype(float) @ member > 0


def sides(
    student: Float[np.ndarray, "*cells"], halls: Float[np.ndarray, "*cells"], more: float
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """What speaks for a mean above 0, and what (negative) for one below, both to be referred to Student's t.

    Args:
        student, halls: of `Moments.studentised`.
        more: the part of the difference that counts where Hall's statistic says more than Student's.
    """
    step = halls - student
    return student + step * np.where(step < 0, 1, more), student + step * np.where(step > 0, 1, more)
