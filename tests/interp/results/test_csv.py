"""Tables as CSV: what a spreadsheet would work out is text there, and numbers stay numbers."""

from __future__ import annotations

import csv

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
    "\r=1",
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


def test_a_table_holds_no_formula(tmp_path) -> None:
    table = pd.DataFrame({"text": FORMULAS, "=number": [-1.5] * len(FORMULAS), "other": [None, *PLAIN[1:]]})
    write_csv(table, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file))
    assert head == ["text", "'=number", "other"]
    assert [row[0] for row in rows] == [f"'{text}" for text in FORMULAS]
    assert [float(row[1]) for row in rows] == [-1.5] * len(FORMULAS)
    assert [row[2] for row in rows] == ["", *PLAIN[1:]]
    assert list(table["text"]) == FORMULAS
