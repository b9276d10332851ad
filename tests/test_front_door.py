"""`import frankenlens as fl`: quick, complete, and only ever its own `hooks`, `interp` and `experiments`."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jedi
import pytest

import frankenlens as fl

HERE = Path(fl.__file__).parent
OWN = ("hooks", "interp", "experiments")
HEAVY = {"torch", "transformers", "numpy", "pandas", "xarray", "matplotlib", *OWN}

IN_PAPERS = """
    find_decisions component_map patch summarise strongest plot_map attribute verify pair_paths path_map
    Intervention sweep residual_map head_map routes Knockout knockout_effects greedy_knockout
    logit_lens compare_lenses direct_logit_attribution train_tuned_lens TunedLens
    attention_shift attention_view vision_swap ablate two_by_two null_pair_denominator recovery_refused
    compare spectra grafted transfer merge freeze train_only lockstep confirm steer mean_difference dose_response
    fine_grained LogitDifference KLToReference Claim put_to_test read_claims planted trial
    bootstrap_mean mcnemar sign_flip adjust thirds TraceFormat PromptBuilder Prompt Pair HookedVLM Address
    read_jsonl load_dataset embedded tasks grading FrankenlensError __version__
""".split()


def python(code: str, *path: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh Python in which these folders come first, and then this repository."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, HERE]))}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=env, cwd=cwd or sys.prefix, capture_output=True, text=True, timeout=120
    )


def fails(code: str, *path: Path, cwd: Path | None = None) -> str:
    """The last line of the traceback that the code ends with."""
    done = python(code, *path, cwd=cwd)
    assert done.returncode == 1, done
    return done.stderr.strip().splitlines()[-1]


def named_for_editors() -> dict[str, str]:
    """Name -> module, of what is imported under TYPE_CHECKING."""
    (block,) = [
        node
        for node in ast.parse(Path(fl.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert not any(alias.asname for node in imports for alias in node.names)
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_editors_see_what_python_finds():
    assert named_for_editors() == fl._WHERE
    assert sum(len(names.split()) for names in fl._NAMES.values()) == len(fl._WHERE), "a name stands twice"
    assert sorted(fl.__all__) == dir(fl) == sorted({"main", "__version__", *fl._WHERE})


def test_every_name_is_what_its_module_calls_so():
    code = """
import importlib, types
import frankenlens as fl
for name, where in fl._WHERE.items():
    found, module = getattr(fl, name), importlib.import_module(where)
    assert found is getattr(module, name), name
    assert vars(fl)[name] is found, "not found anew every time"
    if isinstance(found, types.ModuleType):
        assert found.__name__ == f"{where}.{name}", name
for name in ("lockstep", "transfer", "sweep", "fine_grained", "questions"):  # called like their room
    assert isinstance(getattr(fl, name), types.FunctionType), name
"""
    assert python(code).stderr == ""


def test_the_names_of_papers_are_there():
    assert set(IN_PAPERS) <= set(dir(fl))


@pytest.mark.parametrize("typed", ["find_dec", "logit_l", "Interve", "null_p", "task"])
def test_editors_complete(typed: str):
    code = f"import frankenlens as fl\nfl.{typed}"
    before = jedi.Script(code, path=HERE / "draft.py", project=jedi.Project(HERE)).complete()
    running = jedi.Interpreter(f"fl.{typed}", [{"fl": fl}]).complete()
    for completions in (before, running):
        assert [found.name for found in completions] == [name for name in dir(fl) if name.startswith(typed)]


def test_a_name_that_is_none_is_refused_with_the_nearest():
    misspelt = "component_mpa"
    with pytest.raises(AttributeError, match=r"no 'component_mpa'. Did you mean 'component_map' or"):
        getattr(fl, misspelt)
    assert not hasattr(fl, "_repr_html_") and not hasattr(fl, "__path__")
    with pytest.raises(ImportError, match="cannot import name 'Pear' from 'frankenlens'"):
        exec("from frankenlens import Pear")


def test_the_version_is_that_of_what_is_installed():
    assert fl.__version__ == importlib.import_module("importlib.metadata").version("frankenlens")


def test_importing_is_quick_and_imports_nothing_else():
    code = f"""
import sys, time
begun = time.perf_counter()
import frankenlens as fl
took = time.perf_counter() - begun
fl.__version__, dir(fl)
loaded = {{name.partition(".")[0] for name in sys.modules}} & {HEAVY!r}
assert not loaded, loaded
print(took)
"""
    times = sorted(float(python(code).stdout) for _ in range(5))
    assert times[2] < 0.2, times


def test_hooks_import_no_library_that_only_some_use():
    libraries = ("transformer_lens", "nnsight", "trl", "mergekit", "matplotlib")
    done = python(f"import sys, hooks; print([name for name in {libraries!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done


def test_the_command_is_the_front_door_s_too():
    """As `python -m frankenlens`, and for the console script."""
    version = [sys.executable, "-m", "frankenlens", "--version"]
    done = subprocess.run(version, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"frankenlens {fl.__version__}\n"


@pytest.mark.parametrize("name", OWN)
def test_a_foreign_package_is_one_clear_error(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported, and not only found')")
    error = fails("import frankenlens as fl", tmp_path)
    assert error.startswith(
        f"ImportError: Python finds another {name!r} ({tmp_path / name}) before frankenlens's own"
    )
    assert f"sys.path.insert(0, {str(HERE)!r})" in error and "restart" not in error
    assert error == fails("import frankenlens", cwd=tmp_path)  # a notebook's folder
    assert error == fails("from frankenlens import Pair", tmp_path)

    way_out = f"import sys; sys.path.insert(0, {str(HERE)!r}); import frankenlens"
    assert python(way_out, tmp_path).returncode == 0


def test_all_that_are_foreign_are_named(tmp_path: Path):
    for name in OWN:
        (tmp_path / f"{name}.py").touch()
    error = fails("import frankenlens", tmp_path)
    assert all(f"another {name!r} ({tmp_path / name}.py)" in error for name in OWN)


def test_a_foreign_package_that_came_first_is_one_clear_error(tmp_path: Path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import experiments; sys.path.pop(0); import frankenlens"
    assert fails(code).endswith("Then restart Python, which has imported it already.")


def test_a_foreign_package_that_came_later_is_one_clear_error(tmp_path: Path):
    (tmp_path / "interp").mkdir()
    (tmp_path / "interp" / "__init__.py").touch()
    code = f"import frankenlens as fl, sys; sys.path.insert(0, {str(tmp_path)!r}); fl.tasks"
    assert fails(code).startswith(f"ImportError: Python finds another 'interp' ({tmp_path / 'interp'})")


def test_a_folder_without_init_is_no_alarm_unless_it_wins(tmp_path: Path):
    (tmp_path / "experiments").mkdir()
    assert python("import frankenlens", tmp_path).returncode == 0

    # An editable installation finds its packages only after all of sys.path, and there the folder wins.
    last = f"""
import sys
from importlib.machinery import PathFinder
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(HERE)!r}])
sys.path.remove({str(HERE)!r})
sys.meta_path.append(Editable)
import frankenlens
"""
    error = fails(last, tmp_path, cwd=tmp_path.parent)
    assert f"another 'experiments' ({tmp_path / 'experiments'})" in error
    (tmp_path / "experiments").rmdir()
    assert python(last, tmp_path, cwd=tmp_path.parent).returncode == 0
