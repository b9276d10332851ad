"""A ledger holds looks: whatever else stands on a line is refused, with the line's number and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hooks.errors import FrankenlensError
from interp.hypotheses.claim import Claim, Family
from interp.hypotheses.ledger import Ledger
from interp.questions.examples import Example

CLAIM = Claim("a", "blocks.0", at_least=0.2)
READ = ("pair", "question", "bound", "verdict", "prompts")
"""What is read of every look."""


def written(folder: Path) -> dict[str, Any]:
    """A look as it is written."""
    path = folder / "written.jsonl"
    family, examples = Family("f", (CLAIM,)), [Example("1", (), "q", "2"), Example("2", (), "r", "3")]
    Ledger(path).write("p", family, {"a": CLAIM}, examples, {"a": "supported"})
    (line,) = path.read_text(encoding="utf-8").splitlines()
    return json.loads(line)


NO_LOOKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{repr(value): lambda look, value=value: value for value in (None, True, 3, "supported", [], {})},
    "a list of one": lambda look: [look],
    **{f"no {name}": lambda look, name=name: {k: v for k, v in look.items() if k != name} for name in READ},
    **{f"{name} is null": lambda look, name=name: look | {name: None} for name in (*READ, "registered")},
    **{
        f"{name} is {value!r}": lambda look, name=name, value=value: look | {name: value}
        for name, values in {
            "prompts": ("ab", {"a": 1}, [1], ["a", None]),
            "n_max": ("40", [40]),
            "bound": ("0.2", [0.2]),
            "question": (3, ["q"]),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("kind", NO_LOOKS)
def test_a_line_that_is_json_and_no_look_is_refused(kind: str, tmp_path: Path) -> None:
    look, path = written(tmp_path), tmp_path / "looks.jsonl"
    Ledger(tmp_path / "written.jsonl")
    lines = [json.dumps(one) for one in (look, NO_LOOKS[kind](look), look)]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(
        FrankenlensError, match=r"looks.jsonl, line 2 is no look at a claim .*mend it or move"
    ):
        Ledger(path)
    assert path.read_text(encoding="utf-8").splitlines() == lines
