"""Tables as CSV: what a spreadsheet would work out is text there, and numbers stay numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from interp.results.csv import inert, write_csv

FORMULAS = [
    "=1+1",
    '=HYPERLINK("http://x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1)",
    "\t=1+1",
    "\n=1",
    " =1+1",
    "＝1+1",
    "-A1",
]
PLAIN = ["-0.25 [-0.5, 0.1]", "-1", "+0.3", "a=b", "x-y", "", "-inf", "0.1", "-1e-5", "− 0.3"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_text(text: str) -> None:
    assert inert(text) == f"'{text}"


@pytest.mark.parametrize("text", [*PLAIN, 3, -0.5, None])
def test_all_else_is_as_it_was(text: object) -> None:
    assert inert(text) == text


@pytest.mark.parametrize("text", ["a\r=1+1", "a\r\n=1+1"])
def test_no_row_begins_within_a_cell(text: str, tmp_path: Path) -> None:
    write_csv(pd.DataFrame({"text": [text], "other": [1]}), tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["text", "other"], ["a\n=1+1", "1"]]
    assert inert("\r=1") == "'\n=1"


def test_a_table_holds_no_formula(tmp_path: Path) -> None:
    table = pd.DataFrame({"text": FORMULAS, "=number": [-1.5] * len(FORMULAS), "other": [None, *PLAIN[1:]]})
    write_csv(table, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file))
    assert head == ["text", "'=number", "other"]
    assert [row[0] for row in rows] == [f"'{text}" for text in FORMULAS]
    assert [float(row[1]) for row in rows] == [-1.5] * len(FORMULAS)
    assert [row[2] for row in rows] == ["", *PLAIN[1:]]
    assert list(table["text"]) == FORMULAS
