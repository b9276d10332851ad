"""The committed page of what works is what the code does, and the README says of it what it says."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.architectures import ARCHITECTURES
from tests.architectures.table.page import page, read_back, sentence, shown
from tests.architectures.table.row import COLUMNS, row

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "architectures.md"
PAGE = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
published = pytest.mark.skipif(not PAGE, reason="docs/architectures.md is not made yet: make architectures")
MEASURED = ("llava+olmo2", "mamba2")
"""An image before a decoder whose norms stand behind what they norm, and one that never attends."""


@published
@pytest.mark.parametrize("name", MEASURED)
def test_a_row_is_what_is_measured(name: str) -> None:
    if f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}" not in PAGE:
        pytest.skip("the page was made with other versions")
    committed = read_back(PAGE)[name]
    measured = row(name)["cells"]
    assert {column: shown(measured[column]) for column in COLUMNS} == committed
    assert sum(said == "yes" for said, _ in committed.values()) >= 8


def test_a_page_is_read_back_as_it_was_written() -> None:
    cells = {column: {"state": "yes", "why": ""} for column in COLUMNS}
    rows = [
        {"name": "llava", "transformers": "5", "torch": "2", "cells": cells},
        {
            "name": "llava+olmo2",
            "transformers": "5",
            "torch": "2",
            "cells": cells | {"lens": {"state": "refused", "why": "no a|b"}},
        },
        {
            "name": "gpt2",
            "transformers": "5",
            "torch": "2",
            "cells": cells | {"map": {"state": "FAILS", "why": "2"}},
        },
    ]
    told = read_back(page(rows))
    assert list(told) == ["llava", "llava+olmo2", "gpt2"]
    assert told["llava+olmo2"]["lens"] == ("refused", "no a\\|b")
    assert told["gpt2"]["map"] == ("**fails**", "2")
    said = sentence(page(rows))
    assert "Of the 1 image-text-to-text architectures of transformers 1 open" in said
    assert "inside and text-only ones 3 of 3" in said and "maps run on 2, the lens on 2" in said


@published
def test_every_architecture_has_a_row_and_none_fails() -> None:
    told = read_back(PAGE)
    assert set(told) == set(ARCHITECTURES)
    assert not [
        (name, column)
        for name, cells in told.items()
        for column, (said, _) in cells.items()
        if "fails" in said
    ]


@published
def test_the_readme_says_what_the_page_says() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert sentence(PAGE) in readme, sentence(PAGE)
