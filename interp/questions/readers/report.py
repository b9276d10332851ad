"""What became of the rows of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hooks.errors import shown

__all__ = ["Failure", "ReadReport", "RowError", "counted", "shown"]

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
        notes: what is to be known of the rows as a whole.
        passed: reason to number of rows that were not drawn (`interp.questions.readers.draw`).
    """

    path: str
    n_rows: int
    n_read: int
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    passed: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.n_read} of {self.n_rows} rows read, {len(self.failures)} failed"]
        lines += [f"  row {failure.row}: {failure.reason}" for failure in self.failures]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  {n} rows {reason}" for reason, n in self.passed.items()]
        return "\n".join(lines)


def counted(remarks: Mapping[str, int]) -> tuple[str, ...]:
    """Remarks on single images or rows, with how often each was made."""
    return tuple(f"{n} times: {remark}" if n > 1 else f"once: {remark}" for remark, n in remarks.items())


class RowError(Exception):
    """One row cannot become an example."""
