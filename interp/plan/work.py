"""Work: what one step of a command computes, and what it holds while it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Work:
    """One step.

    Attributes:
        what: it is, in words.
        runs: forward passes, generated texts or interventions, each on one batch.
        flops: of all of them.
        held: item to the bytes that exist together when it holds most, beside the models' weights.
        disk: bytes that it leaves in files, results included, and reads beside the models' own once.
        scales: whether it grows with the number of prompts; what does not is done once.
        uses: how often a model is taken into use for it, where that is less often than it runs.
    """

    what: str
    runs: int | float = 0
    flops: int | float = 0
    held: Mapping[str, int] = field(default_factory=dict)
    disk: int = 0
    scales: bool = True
    uses: int | float | None = None

    def beside(self, item: str, size: int) -> Work:
        """The same step while something else is held."""
        return replace(self, held={**self.held, item: size})

    @property
    def peak(self) -> int:
        """All that is held together."""
        return sum(self.held.values())

    @property
    def used(self) -> int | float:
        """How often a model is taken into use, at most."""
        return self.runs if self.uses is None else self.uses

    def times(self, n: int | float) -> Work:
        """The same step n times, one after the other: what is held does not grow."""
        sums = {"runs": self.runs * n, "flops": self.flops * n, "disk": round(self.disk * n)}
        return replace(self, uses=None if self.uses is None else self.uses * n, **sums)


def together(what: str, parts: Iterable[Work]) -> Work:
    """Steps one after the other as one: counts add up, the widest says what is held."""
    parts = list(parts)
    widest = max(parts, key=lambda part: part.peak, default=Work(what))
    names = {"runs": "runs", "flops": "flops", "disk": "disk", "uses": "used"}
    sums = {name: sum(getattr(part, own) for part in parts) for name, own in names.items()}
    return Work(what, held=widest.held, scales=all(part.scales for part in parts), **sums)
