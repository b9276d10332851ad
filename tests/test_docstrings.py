"""The examples in docstrings say what comes out."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import frankenlens as fl

ROOT = Path(__file__).parents[1]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstrings() -> Iterator[tuple[str, str, Path, int]]:
    """Name, text, file and line of every docstring with an example."""
    files = [
        ROOT / "frankenlens.py",
        *(path for name in ("hooks", "interp", "experiments") for path in (ROOT / name).rglob("*.py")),
    ]
    for path in sorted(files):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, DOCUMENTED) and ">>>" in (text := ast.get_docstring(node) or ""):
                yield f"{module}.{getattr(node, 'name', '')}", text, path, node.body[0].lineno


EXAMPLES = list(docstrings())


@lru_cache
def embedded() -> fl.Pair:
    """The pair that ships: what the examples call `pair`."""
    return fl.Pair.from_pretrained(fl.embedded.path("in"), fl.embedded.path("rl"))


@pytest.mark.parametrize(("name", "text", "path", "line"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_the_example_comes_out(name: str, text: str, path: Path, line: int):
    known: dict[str, Any] = {"fl": fl, "np": np, "torch": torch}
    if "pair" in text and "pair = " not in text:
        known["pair"] = embedded()
    test = doctest.DocTestParser().get_doctest(text, known, name, str(path), line)
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(
        test, out=told.append
    )
    assert not told, "".join(told)


def test_there_are_examples():
    assert EXAMPLES
