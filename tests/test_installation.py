"""What `pip install frankenlens` brings: extras that are named where they are missing, and a wheel that is whole."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from experiments import embedded
from experiments.cli import main
from experiments.commands.map import MapConfig
from experiments.on_ray import require_on_ray
from experiments.retraining.plants import train_components
from experiments.retraining.recipe import read_trl
from experiments.triple.rl import RL, build_prompts
from experiments.triple.train import TrainTriple
from experiments.triple.train import run as train_triple
from hooks import FrankenlensError, HookedVLM
from hooks.extras import EXTRAS, MissingPackage, require_installed
from hooks.processors import load_processor
from interp.lockstep.outcomes import graded
from interp.lockstep.run import Written
from interp.pair.pair import Pair
from interp.prompts import PromptBuilder
from interp.questions.examples import Example
from interp.questions.grading import grade, judge
from interp.questions.readers import read_gsm8k, read_jsonl
from interp.questions.tasks import sample
from interp.transfer.adapted import save_adapted
from interp.transfer.merging import Recipe, merge

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PACKAGES = ("hooks", "interp", "experiments")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = [package for brought in EXTRAS.values() for package in brought]
MATH = Example("a", (), "?", "2", "maths", meta={"grader": "math"})


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=!~;]", text, maxsplit=1)[0].lower().replace("-", "_") for text in requirements}


# --- What is declared


def test_the_extras_are_those_that_the_error_names():
    declared = PROJECT["optional-dependencies"]
    assert {extra: _names(declared[extra]) for extra in EXTRAS} == {
        extra: set(brought) for extra, brought in EXTRAS.items()
    }
    assert declared["all"] == [f"frankenlens[{','.join(EXTRAS)}]"]
    assert "frankenlens[all]" in declared["dev"]
    assert not _names(PROJECT["dependencies"]) & set(OPTIONAL)


def _imported() -> Iterator[tuple[str, str]]:
    """Every package that the code imports, anywhere, and a file that does."""
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], path.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                yield node.module.partition(".")[0], path.name


def test_whatever_is_imported_is_declared():
    """Nothing is there only because something else happens to bring it; pytest brings itself to its plugin."""
    extras = {
        name: some for name, some in PROJECT["optional-dependencies"].items() if name not in ("all", "dev")
    }
    declared = _names(PROJECT["dependencies"]) | _names([text for some in extras.values() for text in some])
    brought_by = packages_distributions()
    undeclared = {
        (name, file)
        for name, file in _imported()
        if name not in sys.stdlib_module_names and name not in (*PACKAGES, "frankenlens", "pytest")
        if not {found.lower().replace("-", "_") for found in brought_by.get(name, [name])} & declared
    }
    assert not undeclared


def test_every_module_is_imported_without_any_extra():
    """But for the trainer, a subclass of TRL's, and TransformerLens, which itself imports `datasets`."""
    code = f"""
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys({OPTIONAL!r})
for package in {PACKAGES!r}:
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if found.name not in ("experiments.triple.shared_prefix", "hooks.transformer_lens.export"):
            importlib.import_module(found.name)
            print(found.name)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(ran.stdout.split()) > 200


# --- What is missing


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


def _merge_folders(out: Path) -> None:
    merge(Recipe("linear"), [embedded.path("in"), embedded.path("rl")], out / "merged")


def _adapter(out: Path) -> None:
    (out / "adapter_config.json").touch()
    Pair.from_pretrained(embedded.path("in"), out)


def _graded_row(out: Path) -> None:
    Image.new("RGB", (8, 8)).save(out / "a.png")
    row = {"image": "a.png", "question": "?", "answer": "2"}
    rows = [row, {**row, "grader": "math"}]
    (out / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read_jsonl(out / "rows.jsonl")


FEATURES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("mergekit", "one tensor merged", lambda out: Recipe("linear").of([torch.ones(2)])),
    ("mergekit", "folders merged", _merge_folders),
    ("math_verify", "an answer judged", lambda out: judge("2", MATH)),
    ("math_verify", "an answer graded", lambda out: grade("2", MATH)),
    ("math_verify", "a row read that names the grader", _graded_row),
    ("ray", "a run on Ray", lambda out: require_on_ray(MapConfig(ray="auto"), True)),
    ("datasets", "a public data set", lambda out: read_gsm8k(out)),
    ("datasets", "prompts for GRPO", lambda out: build_prompts(RL(1, 1, 2), 0)),
    ("peft", "an adapter", _adapter),
    ("peft", "an adapter merged", lambda out: save_adapted(embedded.path("in"), out, out / "merged")),
    (
        "accelerate",
        "a device map",
        lambda out: HookedVLM.from_pretrained(embedded.path("in"), device_map="cpu"),
    ),
    *(
        (package, feature, train)
        for package in ("trl", "datasets", "accelerate")
        for feature, train in (
            ("the triple trained", lambda out: train_triple(TrainTriple(out / "triple"))),
            ("TRL's settings", lambda out: read_trl(None)),
            (
                "a plant trained",
                lambda out: train_components(embedded.path("in"), ["blocks.0"], True, 0, out / "p"),
            ),
        )
    ),
]


@pytest.mark.parametrize(
    ("package", "use"), [pytest.param(p, use, id=f"{feature} without {p}") for p, feature, use in FEATURES]
)
def test_a_missing_package_is_one_error_that_names_the_extra(package, use, without, tmp_path):
    without(package)
    extra = next(extra for extra, brought in EXTRAS.items() if package in brought)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MissingPackage) as raised:
        use(tmp_path)
    said = str(raised.value)
    assert f"needs {package.replace('_', '-')}, " in said
    assert f"pip install 'frankenlens[{extra}]'" in said
    assert len(said.splitlines()) == 1
    written = {path.suffix for path in set(tmp_path.iterdir()) - set(before)}
    assert written <= {".json", ".jsonl", ".png"}, "nothing but what the test itself wrote"


def test_every_optional_package_is_tried():
    assert {package for package, _, _ in FEATURES} == set(OPTIONAL)


def test_a_missing_package_is_never_an_examples_own_fault(without):
    """A measurement records what a grader raises as that answer's reason; this would be every answer's."""
    without("math_verify")
    prompt = PromptBuilder(load_processor(embedded.path("in"))).build(
        sample("sum", 1, seed=0, split="map")[0]
    )
    prompt = replace(prompt, example=replace(prompt.example, meta={"grader": "math"}))
    with pytest.raises(MissingPackage):
        graded(Written(prompt, (), "2", "2", True, "", (), ()), grade)


@pytest.mark.parametrize("command", [["freeze"], ["planted", "--kinds", "reinforced"], ["train-triple"]])
def test_a_command_says_it_in_one_line_before_anything_is_loaded(command, without, tmp_path, capsys):
    without("trl")
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "needs trl" in said and "'frankenlens[train]'" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_same_name_is_no_package(monkeypatch, tmp_path):
    """Research repositories have a folder `datasets/`, which Python would import as an empty namespace."""
    (tmp_path / "a_package_of_data").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match="needs a-package-of-data"):
        require_installed("this", "a_package_of_data")


def test_what_is_installed_is_no_error():
    require_installed("this", *OPTIONAL)
    assert issubclass(MissingPackage, FrankenlensError)


# --- make, with a Python that only writes down what it is asked


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a target in a folder of its own; returns what it asked of the environment's programs."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs, log = tmp_path / ".venv" / "bin", tmp_path / "log"
    programs.mkdir(parents=True)
    for name in ("python", "frankenlens", "ruff", "pyright"):
        lines = ["#!/bin/sh", f'echo "{name} $*" >> log', 'case "$*" in *install*) exit ${BROKEN:-0};; esac']
        (programs / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (programs / name).chmod(0o755)

    def run(target: str, broken: bool = False) -> list[str]:
        log.write_text("", encoding="utf-8")
        environment = {**os.environ, "BROKEN": "1" if broken else "0", "MAKEFLAGS": ""}
        ran = subprocess.run(["make", target], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (ran.returncode != 0) == broken, ran.stdout + ran.stderr
        return log.read_text(encoding="utf-8").splitlines()

    return run


def _installed(asked: list[str]) -> list[str]:
    return [line.rpartition(" ")[2] for line in asked if " install " in line]


def test_the_demo_installs_the_core_alone_and_the_tests_everything_each_once(make):
    assert _installed(make("demo")) == ["."]
    assert _installed(make("demo")) == []
    assert _installed(make("test")) == [".[dev]"]
    for target in ("check", "demo", "test"):
        assert _installed(make(target)) == []


@pytest.mark.parametrize("before", ["demo", "test"])
def test_what_was_broken_off_is_installed_anew(make, before, tmp_path):
    make(before)
    for stamp in (tmp_path / ".venv").glob(".*"):
        os.utime(stamp, (0, 0))  # older than what is asked for
    assert _installed(make("test", broken=True)) == [".[dev]"]
    assert _installed(make("demo")) == ["."], "the environment may be anything now"
    assert _installed(make("test")) == [".[dev]"]
    assert _installed(make("demo")) == []


def test_pre_commit_runs_what_make_check_runs(make):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    make("test")
    assert [f".venv/bin/{line}".strip() for line in make("check")] == [hook["entry"] for hook in hooks]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


# --- The wheel, in an environment of its own, from another folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools keeps a `build/` whose leftovers would go into the next wheel."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in (
        *PACKAGES,
        "frankenlens.py",
        "frankenlens_pytest.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(tree))
    return next(out.glob("frankenlens-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the wheel, and borrows everything else from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    _pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    borrowed = sorted(
        {str(Path(module.__file__).parent.parent) for module in (torch, pytest) if module.__file__}
    )
    (Path(site) / "borrowed.pth").write_text(
        "\n".join(borrowed), encoding="utf-8"
    )  # their own .pth are not followed
    return python


def _pip(*args: str) -> None:
    ran = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def _run(command: list[str | Path], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert wanted - names == set()
    assert {
        "interp/results/page.html.j2",
        "interp/results/page.css",
        "experiments/embedded/rl/config.json",
    } < names
    assert not [name for name in names if name.startswith(("tests/", "notebooks/"))]


def test_the_command_runs_from_another_folder(python, tmp_path):
    command = python.parent / "frankenlens"
    assert _run([command, "--version"], tmp_path).startswith("frankenlens ")
    names = (*PACKAGES, "frankenlens", "frankenlens_pytest")
    found = f"from importlib.util import find_spec\nfor name in {names!r}: print(find_spec(name).origin)"
    for file in _run([python, "-c", found], tmp_path).split():
        assert python.parent.parent in Path(file).parents
    small = ["--n", "16", "--points", "mlp_out", "--direction", "rl_to_in"]
    _run([command, "map", "--out", "map", *small], tmp_path)
    page = (tmp_path / "map" / "report.html").read_text(encoding="utf-8")
    assert "<style" in page and len(page) > 10_000
    assert {path.suffix for path in (tmp_path / "map").glob("*.*")} == {".html", ".png", ".csv", ".nc"}


def test_pytest_finds_the_plugin_and_collects_a_file_of_claims(python, tmp_path):
    claim = "claims:\n  - {name: mine, component: blocks.3.mlp, role: reasoning, at_least: 0.2}\n"
    (tmp_path / "late.claims.yaml").write_text(claim, encoding="utf-8")
    told = _run([python, "-m", "pytest", "--collect-only", "-q", "late.claims.yaml"], tmp_path)
    assert "late.claims.yaml::mine" in told
