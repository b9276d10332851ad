"""Every notebook runs from top to bottom: the first by default, all of them in `make notebooks`."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

RUN = [NOTEBOOKS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS[1:])]


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_it_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_comes_in_by_the_front_door(path):
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert re.findall(r"^\s*import frankenlens as fl$", code, re.MULTILINE)
    assert not re.findall(r"^\s*(?:from|import) (?:hooks|interp|experiments)\b.*", code, re.MULTILINE)


def test_there_are_notebooks():
    assert NOTEBOOKS
