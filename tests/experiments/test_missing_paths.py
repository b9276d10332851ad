"""Every option that takes a path says of one that is not there: no such file or folder, and what to give."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import embedded
from experiments.cli import main

PAIRED = (
    "map",
    "suite",
    "metrics",
    "transfer",
    "freeze",
    "compare",
    "localize",
    "attention",
    "lens",
    "knockout",
)
PAIRED = (*PAIRED, "lockstep", "test", "planted", "paths", "trajectory")
ASKED = ("map", "suite", "metrics", "transfer", "attention", "lens", "knockout", "lockstep", "paths")


def rows() -> list[tuple[str, str, str]]:
    """Command, option, and what it wants."""
    found = [(command, option, "folder") for command in PAIRED for option in ("--in", "--rl", "--base")]
    found += [(command, "--data", "file") for command in ASKED]
    found += [("trajectory", "--claims", "file")]
    found += [("localize", "--data", "file or folder"), ("suite", "--functions-data", "folder")]
    found += [(command, "--map", "file") for command in ("paths", "lockstep")]
    found += [("map", "--template", "file"), ("map", "--images", "folder"), ("freeze", "--trl", "file")]
    found += [
        ("freeze", "--train", "file"),
        ("freeze", "--train-images", "folder"),
        ("test", "--pairs", "folder"),
    ]
    return [*found, ("test", "", "file")]


@pytest.mark.parametrize(("command", "option", "what"), rows())
def test_what_is_not_there_is_named(command: str, option: str, what: str, tmp_path: Path, capsys) -> None:
    absent, in_, rl = tmp_path / "absent" / "one", str(embedded.path("in")), str(embedded.path("rl"))
    (there := tmp_path / "rows.jsonl").write_text("{}")
    (claims := tmp_path / "claims.yaml").write_text("{}")
    models = {"--in": in_, "--rl": rl}
    given: dict[str, list[str]] = {name: [path] for name, path in models.items()} | {option: [str(absent)]}
    if option in ("--images", "--train-images"):
        given["--data"] = [str(there)]
    if option in ("--train", "--train-images"):
        given |= {"--train": [str(absent if option == "--train" else claims)], "--data": [str(there)]}
    if option == "--pairs":
        given = {option: [in_, str(absent)]}
    positional = [str(given.pop("", [claims])[0])] if command == "test" else []
    words = [word for name, values in given.items() for word in (name, *values)]
    assert main([command, *positional, *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"no such {what}: {absent}" in said and f"The nearest folder that exists is {tmp_path}." in said
    assert "Give " in said and "processor" not in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
