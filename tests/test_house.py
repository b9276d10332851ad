"""The house as it stands: imports of the three packages run one way, without circles, and leave private names alone.

Every import counts, those inside functions and those for typing alone too. A package's `__init__` is its face: a name
imported from it counts as an import of the module that the face takes it from.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hooks", "interp", "experiments")
GROUND = ("questions", "prompts", "statistics", "results", "regions", "updates")
MIDDLE = ("pair", "metrics", "sweep", "decision")
EVIDENCE = ("hypotheses", "planting")
TOP = ("plan",)


class Import(NamedTuple):
    """One name that a module takes from another (`name` is "" where a whole module is taken)."""

    importer: str
    module: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name or 'all'} of {self.module}"


@cache
def modules() -> dict[str, Path]:
    """Dotted name to file, of the three packages."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    named = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def own_imports(name: str, source: str) -> Iterator[Import]:
    """The imports of one module's source, of these packages alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    yield Import(name, alias.name, "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno}: imports are absolute"
            if (node.module or "").split(".")[0] in PACKAGES:
                for alias in node.names:
                    yield Import(name, str(node.module), alias.name, node.lineno)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        found
        for name, path in modules().items()
        for found in own_imports(name, path.read_text(encoding="utf-8"))
    )


@cache
def faces() -> dict[tuple[str, str], str]:
    """(package, name) to the module that its `__init__` takes the name from."""
    own = {name for name, path in modules().items() if path.name == "__init__.py"}
    return {
        (found.importer, found.name): found.module
        for found in imports()
        if found.importer in own and found.name
    }


def origin(found: Import) -> str:
    """The module that a name comes from, through as many faces as stand between."""
    module = found.module
    while (module, found.name) in faces():
        module = faces()[module, found.name]
    submodule = f"{module}.{found.name}"
    return submodule if submodule in modules() else module


def room(module: str) -> str:
    """`interp.sweep.engine` → `sweep`."""
    return module.split(".")[1] if module.count(".") else ""


def is_face(module: str) -> bool:
    return modules()[module].name == "__init__.py"


def graph() -> dict[str, set[str]]:
    """Module to those it imports. A face that only collects its own room's names is left out."""
    edges: dict[str, set[str]] = {}
    for found in imports():
        if not (is_face(found.importer) and found.module.startswith(found.importer)):
            edges.setdefault(found.importer, set()).add(origin(found))
    return edges


def test_there_is_no_circle_of_imports():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as circle:
        pytest.fail(" → ".join(circle.args[1]))


def test_the_rooms_of_interp_form_no_circle():
    rooms: dict[str, set[str]] = {}
    for found in imports():
        here, there = found.importer, origin(found)
        if here.startswith("interp.") and there.startswith("interp.") and room(here) != room(there):
            rooms.setdefault(room(here), set()).add(room(there))
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as circle:
        pytest.fail(" → ".join(circle.args[1]))


def floor(module: str) -> int:
    """How high a module stands; it may import what stands no higher."""
    package = module.split(".")[0]
    if package != "interp" or not room(module):
        return {"hooks": 0, "interp": 1, "experiments": 9}[package]
    for height, rooms in ((1, GROUND), (2, MIDDLE), (4, EVIDENCE), (5, TOP)):
        if room(module) in rooms:
            return height
    return 3


def test_no_import_runs_upwards():
    upward = [str(found) for found in imports() if floor(found.importer) < floor(origin(found))]
    assert not upward


def test_no_room_takes_private_names_of_another():
    taken = []
    for found in imports():
        private = found.name.startswith("_") or any(part.startswith("_") for part in found.module.split("."))
        if private and found.importer.rsplit(".", 1)[0] != found.module.rsplit(".", 1)[0]:
            taken.append(str(found))
    assert not taken


def test_every_room_is_a_folder_with_a_face():
    top = sorted(path.name for path in (ROOT / "interp").glob("*.py"))
    assert len([name for name in top if name != "__init__.py"]) <= 2, top
    for package in ("hooks", "interp"):
        for folder in (ROOT / package).rglob("*"):
            if folder.is_dir() and list(folder.glob("*.py")):
                assert (folder / "__init__.py").exists(), folder
                assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_a_circle_and_an_upward_import_would_be_seen():
    """The reading itself, on sources in which both are known."""
    source = (
        "def f():\n    from interp.sweep import sweep\n\n\nif TYPE_CHECKING:\n    import experiments.cli\n"
    )
    found = list(own_imports("interp.statistics.paired", source))
    assert [(one.module, one.name) for one in found] == [("interp.sweep", "sweep"), ("experiments.cli", "")]
    assert origin(found[0]) == "interp.sweep.engine"
    assert all(floor(one.importer) < floor(origin(one)) for one in found)
