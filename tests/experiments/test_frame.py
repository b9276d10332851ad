"""The frame of the commands, on a command that needs no model; and that none of them builds a frame of its own."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest

from experiments import frame
from experiments.cli import COMMANDS
from experiments.frame import Command, finished, require_begun_alike
from experiments.options import Only, a_task, default, from_command_line
from experiments.settings import DataSettings, ModelSettings, Questions, require_sound
from hooks.errors import FrankenlensError
from interp.results.page import Account, Section

LINES = 10
FOLDER = Path(frame.__file__).parent / "commands"


@dataclass(frozen=True)
class Config(ModelSettings, DataSettings):
    """Settings with every kind of default."""

    n: int = default(6, paper=a_task(10, ("sum", "same")))
    way: Literal["wide", "single"] = default("wide", paper="wide")
    width: int = default(3, only=Only("--way wide", lambda config: config.way == "wide"))
    also: tuple[str, ...] = default((), only=Only("--way wide", lambda config: config.way == "wide"))
    drawn: bool = default(False, paper=True)
    paper: bool = False
    out: Path = Path("out/own")


class Models:
    """What is opened; it counts how often it is closed."""

    closed = 0

    def provenance(self) -> dict[str, Any]:
        about = {"name_or_path": "rl", "class": "Model", "dtype": "float32", "weights_sha256": "0" * 64}
        return {"rl": about}

    def close(self) -> None:
        self.closed += 1


def section(name: str) -> Section:
    account = Account("counted", "3", left_out={"no answer": 1}, counts={"asked": 3})
    return Section(name, f"Title {name}", f"found {name}", account, {name: pd.DataFrame({"x": [1.0]})})


@pytest.fixture
def opened() -> Models:
    return Models()


def command(opened: Models, measure) -> Command[Config, Models, Questions]:
    def load(config: Config) -> Questions:
        return Questions([], {"row 2: no image": 1, "no answer": 4})

    def check(config: Config) -> None:
        """All is well."""

    return Command(Config, check, load, lambda config: opened, measure)


def both(models: Models, asked: Questions, config: Config) -> Iterator[Section]:
    yield section("one")
    yield section("two")


def parsed(*args: str) -> Config:
    return from_command_line(Config, args, "own")


def test_all_is_published_told_and_closed(tmp_path, opened, capsys):
    sections = command(opened, both).run(Config(out=tmp_path / "out"))
    assert [one.name for one in sections] == ["one", "two"] and opened.closed == 1
    assert sections[0].account.left_out == {"row 2: no image": 1, "no answer": 5}
    names = ["one.csv", "report.html", "two.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "two: row 2: no image" in page and "one: asked 3" in page
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["Title one: found one", "Title two: found two"]
    assert said[2] == f"{tmp_path / 'out'}: one.csv, report.html, two.csv"


def test_what_is_finished_is_published_where_a_later_section_fails(tmp_path, opened):
    def measure(models: Models, asked: Questions, config: Config) -> Iterator[Section]:
        yield section("one")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        command(opened, measure).run(Config(out=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "report.html"]
    assert opened.closed == 1


def test_an_interruption_publishes_nothing_and_closes(tmp_path, opened):
    def measure(models: Models, asked: Questions, config: Config) -> Iterator[Section]:
        yield section("one")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command(opened, measure).run(Config(out=tmp_path / "out"))
    assert opened.closed == 1 and not (tmp_path / "out").exists()


def test_nothing_is_opened_before_all_is_refused_that_can_be(tmp_path, opened):
    (tmp_path / "file").write_text("")

    def never(config: Config) -> Models:
        raise AssertionError("opened")

    for config, words in (
        (Config(in_="somewhere"), "go together"),
        (Config(n=0), "--n is 0"),
        (Config(out=tmp_path / "file" / "out"), "is no folder that you may write to"),
    ):
        with pytest.raises(FrankenlensError, match=words):
            replace(command(opened, both), open=never).run(config)
    assert opened.closed == 0


def test_of_several_processes_the_first_measures(tmp_path, opened, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert command(opened, both).run(Config(out=tmp_path)) == []
    assert list(tmp_path.iterdir()) == [] and opened.closed == 0


def test_finished_parts_are_found_again_by_all_that_they_depend_on(tmp_path):
    about = {"models": {"rl": "ab"}, "questions": [("id", "task")]}
    assert finished(tmp_path, **about) == finished(tmp_path, **dict(reversed(about.items())))
    assert finished(tmp_path, **about) != finished(tmp_path, **{**about, "models": {"rl": "cd"}})


def test_a_run_that_was_begun_otherwise_is_not_continued(tmp_path):
    file = tmp_path / "new" / "settings.json"
    require_begun_alike(file, {"lr": 1e-4, "seeds": (1, 2)})
    require_begun_alike(file, {"lr": 1e-4, "seeds": [1, 2]})
    with pytest.raises(FrankenlensError, match=r"holds a run with other settings \(lr\)"):
        require_begun_alike(file, {"lr": 1e-3, "seeds": [1, 2]})
    assert json.loads(file.read_text())["lr"] == 1e-4
    assert [path.name for path in file.parent.iterdir()] == ["settings.json"]


def test_defaults_are_ours_or_the_papers():
    assert (Config().n, Config().way, Config().width, Config().drawn) == (6, "wide", 3, False)
    assert (Config(paper=True).n, Config(paper=True).drawn) == (20, True)
    assert Config(paper=True, data=Path("x.jsonl")).n == 10
    assert Config(n=5, way="wide").given == {"n", "way"} and Config().given == set()


def test_a_copy_with_changes_was_given_no_more_than_its_original_and_the_changes():
    changed = replace(Config(n=5), way="single")
    assert changed.given == {"n", "way"}
    require_sound(changed)  # width was not given, so it need not mean anything
    assert replace(Config(), paper=True) == Config(paper=True)
    assert replace(Config(paper=True), data=Path("x.jsonl")).n == 10
    assert "filled" not in Config().options and Config().options["n"] == 6


@pytest.mark.parametrize(
    "args",
    [
        ("--paper",),
        ("--paper", "--n", "20"),
        ("--paper", "--drawn"),
        ("--paper", "--n=10", "--data", "x.jsonl"),
        ("--way", "single", "--also"),  # nothing needs nothing
        ("--width", "3"),
    ],
)
def test_what_agrees_is_let_through(args):
    require_sound(parsed(*args))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--paper", "--n", "6"), "which has --n 20, not --n 6: leave out --n, or --paper"),  # our default
        (("--paper", "--n=6", "--data", "x.jsonl"), "which has --n 10, not --n 6"),
        (("--paper", "--no-drawn"), "which has --drawn, not --no-drawn: leave out --drawn"),
        (("--paper", "--way", "single"), "which has --way wide, not --way single"),
        (("--way", "single", "--width", "3"), "--width 3 needs --way wide: give that, or leave out --width"),
        (("--way", "single", "--also", "a", "b"), "--also a b needs --way wide"),
    ],
)
def test_what_was_given_is_never_overridden_or_ignored_without_a_word(args, words):
    with pytest.raises(FrankenlensError, match=re.escape(words)):
        require_sound(parsed(*args))


def test_the_command_line_and_python_say_the_same():
    assert parsed("--paper") == Config(paper=True)
    assert parsed("--n", "6").given == Config(n=6).given == {"n"}
    assert parsed("--seed", "3", "--also", "a") == Config(seed=3, also=("a",))


def test_no_ten_lines_stand_in_two_commands():
    """Imports count; blanks, brackets and quotes do not."""
    places: dict[str, set[str]] = defaultdict(set)
    for path in sorted(FOLDER.glob("*.py")):
        lines = [re.sub(r"\W+", " ", line).strip() for line in path.read_text().splitlines()]
        lines = [line for line in lines if line]
        for first in range(len(lines) - LINES + 1):
            window = "\n".join(lines[first : first + LINES])
            places[hashlib.sha256(window.encode()).hexdigest()].add(path.name)
    assert len(places) > 1000
    assert not [files for files in places.values() if len(files) > 1]


def test_every_command_stands_in_the_frame():
    modules = {module.rpartition(".")[2] for module, _ in COMMANDS.values()}
    own = {path.stem for path in FOLDER.glob("*.py") if "\nCOMMAND = Command(" in path.read_text()}
    assert own == modules - {"train", "merge", "patterns"}  # recipes
    for path in FOLDER.glob("*.py"):
        source = path.read_text()
        for taken in ("provenance(", "publishing(", "save_sections(", "sys.exit", "def run("):
            assert taken not in source.replace("pair.provenance(", "").replace("def provenance(", "").replace(
                ".opened[name].provenance(", ""
            ), (path.name, taken)
