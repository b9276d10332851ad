"""Which rows of a file or a data set are taken: drawn by seed, of one half, and none that was looked at before."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Int

from hooks.errors import FrankenlensError
from hooks.extras import MissingPackage
from interp.questions.examples import Example, fingerprint
from interp.questions.readers.report import Failure, RowError

Split = Literal["all", "explore", "confirm"]
Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Seen:
    """Examples that a result was found on.

    Attributes:
        keys: their ids and fingerprints (`interp.hypotheses.examples_of`).
        when: what they were looked at for, as the end of a sentence: "when the map was made".
    """

    keys: frozenset[str] = frozenset()
    when: str = ""

    def __contains__(self, example: Example) -> bool:
        return bool(self.keys) and (example.id in self.keys or fingerprint(example) in self.keys)

    @property
    def reason(self) -> str:
        """Why such an example is left out."""
        return f"looked at {self.when}"


@dataclass(frozen=True)
class Draw:
    """Which rows are taken; by default all, in their own order.

    Attributes:
        n: at most so many.
        seed: rows are tried in an order that is drawn from it; None: in their own order, so that the first n are taken.
        split: half of the rows, `explore` or `confirm`. A row's half follows from what it asks, whatever the order of
            the file, the seed and n.
        seen: what is passed over.
        legacy: the n rows that NumPy's `RandomState(seed).choice` takes without replacement, as 2602.12395 does; a row
            among them that cannot be read is not made up for by another.
    """

    n: int | None = None
    seed: int | None = None
    split: Split = "all"
    seen: Seen = field(default_factory=Seen)
    legacy: bool = False

    def order(self, n_rows: int) -> list[int]:
        """Places of the rows, in the order in which they are tried."""
        if self.seed is None:
            return list(range(n_rows))
        if self.legacy:
            n = n_rows if self.n is None else min(self.n, n_rows)
            every = np.arange(n_rows)
            return every.tolist() if n == n_rows else _chosen(every, n, self.seed)
        return np.random.default_rng(self.seed).permutation(n_rows).tolist()


def _chosen(every: Int[np.ndarray, " row"], n: int, seed: int) -> list[int]:
    return sorted(np.random.RandomState(seed).choice(every, size=n, replace=False).tolist())


@dataclass(frozen=True)
class Taken:
    """What became of the rows.

    Attributes:
        examples: in the order of the rows.
        failures: rows that cannot be read.
        passed: reason to number of rows that were not taken, and may well be read.
    """

    examples: tuple[Example, ...]
    failures: tuple[Failure, ...]
    passed: Mapping[str, int]


def half_of(asked: str) -> Split:
    """The half that a row belongs to which asks this."""
    digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest()
    return "explore" if digest[0] % 2 == 0 else "confirm"


def take(
    rows: Sequence[tuple[int, Rows]],
    draw: Draw,
    asked: Callable[[Rows], str],
    read: Callable[[int, Rows], Example],
) -> Taken:
    """Try rows in the order of the draw until there are enough.

    Arguments:
        rows: with their numbers.
        draw: which of them.
        asked: what a row asks, in one text.
        read: number and row -> example, or `RowError`.
    """
    found: dict[int, Example] = {}
    failures: list[Failure] = []
    passed: Counter[str] = Counter()
    order = draw.order(len(rows))
    if len(order) < len(rows):
        passed[f"not drawn (--n {draw.n})"] = len(rows) - len(order)
    for tried, place in enumerate(order):
        if draw.n is not None and len(found) == draw.n:
            passed[f"not drawn (--n {draw.n})"] += len(order) - tried
            break
        n, row = rows[place]
        if draw.split != "all" and half_of(asked(row)) != draw.split:
            passed[f"of the other half (--split {draw.split})"] += 1
            continue
        try:
            example = read(n, row)
        except MissingPackage:  # no fault of the row
            raise
        except (RowError, FrankenlensError) as error:
            failures.append(Failure(n, str(error)))
            continue
        if example in draw.seen:
            passed[draw.seen.reason] += 1
        else:
            found[place] = example
    examples = tuple(found[place] for place in sorted(found))
    return Taken(examples, tuple(sorted(failures, key=lambda one: one.row)), dict(passed))
