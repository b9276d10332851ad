"""Tables as CSV, in which nothing is a formula to whatever opens them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

_BEGINS = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
_NUMBERS = re.compile(r"[-+\d\s.,%()\[\];:–−±/]*(?:e[-+]?\d+)?|[-+]?(?:inf|nan)", re.IGNORECASE)


def write_csv(table: pd.DataFrame, path: Path | str) -> None:
    """Write a table; a text that spreadsheets would take for a formula gets an apostrophe in front of it.

    Numbers, also those that are written out with their interval, stay as they are.
    """
    texts = {name: column.map(inert) for name, column in table.items() if column.dtype.kind not in "biufcmM"}
    table.assign(**{str(name): column for name, column in texts.items()}).rename(columns=inert).to_csv(
        path, index=False
    )


def inert(value: Any) -> Any:
    """A cell that no spreadsheet works out (https://owasp.org/www-community/attacks/CSV_Injection).

    Example:
        >>> from interp.results.csv import inert
        >>> inert("=HYPERLINK(1)"), inert("-0.25 [-0.5, 0.1]"), inert("-2+3+cmd|' /C calc'!A0"), inert(-1)
        ("'=HYPERLINK(1)", '-0.25 [-0.5, 0.1]', "'-2+3+cmd|' /C calc'!A0", -1)
    """
    if not isinstance(value, str):
        return value
    value = re.sub(r"\r\n?", "\n", value)  # a bare carriage return is not quoted, and begins a row
    if not _BEGINS.match(value) or _NUMBERS.fullmatch(value):
        return value
    return f"'{value}"
