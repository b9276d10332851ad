"""What became of the rows of a file."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 60
REASON = 400


@dataclass(frozen=True)
class Failure:
    """A row that was not read.

    Attributes:
        row: its line in a file of JSON lines, else its place among the rows; from 1.
        reason: what is wrong with it; cut off where it quotes more than can be read.
    """

    row: int
    reason: str

    def __post_init__(self) -> None:
        if len(self.reason) > REASON:
            object.__setattr__(self, "reason", f"{self.reason[:REASON]} …")


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows of a file. `str(report)` says it in words.

    Attributes:
        path: the file, or the name of a data set.
        n_rows: rows that are not blank.
        n_read: rows that became examples.
        failures: the others.
        renamed: rows whose id had occurred before and got `#row` appended.
        notes: what is to be known of the rows as a whole.
        passed: reason to number of rows that were not drawn (`interp.questions.readers.draw`).
    """

    path: str
    n_rows: int
    n_read: int
    failures: tuple[Failure, ...] = ()
    renamed: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    passed: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.n_read} of {self.n_rows} rows read, {len(self.failures)} failed"]
        lines += [f"  row {failure.row}: {failure.reason}" for failure in self.failures]
        if self.renamed:
            lines.append(
                f"  {len(self.renamed)} rows repeat an id and were renamed, the first in row {self.renamed[0]}"
            )
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  {n} rows {reason}" for reason, n in self.passed.items()]
        return "\n".join(lines)


def counted(remarks: Mapping[str, int]) -> tuple[str, ...]:
    """Remarks on single images or rows, with how often each was made."""
    return tuple(f"{n} times: {remark}" if n > 1 else f"once: {remark}" for remark, n in remarks.items())


class RowError(Exception):
    """One row cannot become an example."""


def shown(value: Any) -> str:
    """A value as a message quotes it: as Python writes it, or how it begins and how long it is."""
    if isinstance(value, (str, bytes)):
        start = repr(value[:SHOWN])
        unit = "characters" if isinstance(value, str) else "bytes"
        return start if len(value) <= SHOWN else f"{start}… ({len(value):,} {unit})"
    return reprlib.repr(value)  # it neither goes deep nor on for long
