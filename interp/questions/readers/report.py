"""What became of the rows of a file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """A row that was not read.

    Attributes:
        row: its line in the file, from 1.
        reason: what is wrong with it.
    """

    row: int
    reason: str


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
    """

    path: str
    n_rows: int
    n_read: int
    failures: tuple[Failure, ...] = ()
    renamed: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.n_read} of {self.n_rows} rows read, {len(self.failures)} failed"]
        lines += [f"  row {failure.row}: {failure.reason}" for failure in self.failures]
        if self.renamed:
            lines.append(
                f"  {len(self.renamed)} rows repeat an id and were renamed, the first in row {self.renamed[0]}"
            )
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


class RowError(Exception):
    """One row cannot become an example."""
