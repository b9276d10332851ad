"""The README's Python runs as it stands, block after block, through the front door alone; its commands are commands."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray as xr

from experiments import planning
from experiments.cli import COMMANDS, main
from experiments.commands import suite
from experiments.options import from_command_line
from interp.questions.examples import with_looked_at
from interp.questions.tasks import sample
from interp.results.files import provenance, save_dataset
from tests.benchmarks.gpu import table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    assert re.findall(r"^\s*(?:from|import) .*", "".join(blocks), re.MULTILINE) == [
        "import frankenlens as fl"
    ]
    names: dict = {}
    for number, block in enumerate(blocks):
        path = tmp_path / f"block_{number}.py"  # nnsight reads the source of a trace
        path.write_text(block, encoding="utf-8")
        exec(compile(block, str(path), "exec"), names)
    assert names["result"].value.shape == (1, 3, 4)
    assert np.isfinite(names["result"].value.values[0, 0]).all()
    assert (tmp_path / "out" / "sweep").is_dir()


def test_what_was_measured_on_a_gpu_is_what_the_newest_results_say() -> None:
    text = README.read_text(encoding="utf-8")
    assert table.replaced(text, table.section(table.newest(table.RESULTS))) == text


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def _commands() -> list[list[str]]:
    """Every line of the shell blocks as words, without comments."""
    lines = "".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_shell_line_is_one_that_is_tested() -> None:
    assert {words[0] for words in _commands()} == {"make", "frankenlens", "pytest"}


def test_targets_of_make_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    asked = [words[1] for words in _commands() if words[0] == "make"]
    assert asked and set(asked) <= set(targets)


@pytest.mark.parametrize("words", [words for words in _commands() if words[0] == "frankenlens"], ids=" ".join)
def test_commands_and_their_options_are_there(words: list[str]) -> None:
    """Read as the command line reads them, up to the checkpoints, which are the reader's own."""
    plans, words = (
        "plan" in words[1:2] or "--plan" in words,
        [w for w in words if w not in ("plan", "--plan")],
    )
    command = import_module(COMMANDS[words[1]][0]).COMMAND
    if plans:
        found = planning.read(words[1], command, words[2:])[1]
    else:
        found = from_command_line(command.settings, words[2:], " ".join(words[:2]))
    assert type(found) is command.settings


def test_what_the_suite_runs_is_the_same_here_in_its_help_and_in_the_command(capsys) -> None:
    """In the README's sentence and table, in the list of commands, and in the suite's own help."""
    parts = list(suite.PARTS)
    told = f"{', '.join(parts[:-1])} and {parts[-1]}"
    section = README.read_text(encoding="utf-8").split("## The whole suite")[1].split("\n## ")[0]
    sentence = " ".join(section.split("All of them")[0].split())
    assert sentence.startswith(f"`frankenlens suite` runs `{'`, `'.join(parts[:-1])}` and `{parts[-1]}`,")
    rows = re.findall(r"^\| `(\w+)`( \(not in `suite`\))? \|", section, re.MULTILINE)
    assert [name for name, outside in rows if not outside] == parts
    outside = [name for name, without in rows if without]
    assert outside and not set(outside) & set(parts) and all(f"`{name}`" in sentence for name in outside)
    assert COMMANDS["suite"][1].startswith(told)
    with pytest.raises(SystemExit):
        main(["suite", "--help"])
    assert f"It runs {told};" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_claims_are_collected_in_a_clone(tmp_path: Path) -> None:
    """With the repository's own settings of pytest."""
    [words] = [words for words in _commands() if words[0] == "pytest"]
    [claims] = [block for block in _blocks("yaml") if words[1] in block]
    (tmp_path / words[1]).write_text(claims, encoding="utf-8")
    [found_on] = re.findall(r"^found_on: (\S+)", claims, re.MULTILINE)
    (tmp_path / found_on).parent.mkdir(parents=True)
    save_dataset(
        with_looked_at(xr.Dataset(), sample("sum", 1, 0, "map")),
        tmp_path / found_on,
        provenance({}, {}, {}, {}),
    )
    asked = [str(tmp_path / words[1]), *words[2:], "-c", str(ROOT / "pyproject.toml"), "--collect-only"]
    ran = subprocess.run([sys.executable, "-m", "pytest", *asked], cwd=ROOT, capture_output=True, text=True)
    assert "2 tests collected" in ran.stdout, ran.stdout + ran.stderr


def test_claims_are_found_on_what_the_demo_writes() -> None:
    [written] = re.findall(r"frankenlens map --out (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    [claims] = [block for block in _blocks("yaml") if "found_on" in block]
    assert re.findall(r"^found_on: (\S+)", claims, re.MULTILINE) == [f"{written}/map.nc"]
