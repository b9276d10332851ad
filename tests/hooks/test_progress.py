"""In a notebook whose kernel has no ipywidgets, importing any package first leaves tqdm without its warning."""

import subprocess
import sys

import pytest

KERNEL = """
import sys, types, warnings
IPython = types.ModuleType("IPython")
IPython.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules.update({"IPython": IPython, "ipykernel.zmqshell": IPython, "ipywidgets": None})
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for name in sys.argv[1:]:
        __import__(name)
print(sum("IProgress not found" in str(one.message) for one in said))
"""


def _warned(*modules: str) -> int:
    ran = subprocess.run([sys.executable, "-c", KERNEL, *modules], capture_output=True, text=True, check=True)
    return int(ran.stdout)


def test_tqdm_alone_warns() -> None:
    assert _warned("tqdm.auto") == 1


@pytest.mark.parametrize("package", ["hooks", "interp", "experiments"])
def test_no_package_of_ours_lets_it_warn(package: str) -> None:
    assert _warned(package, "tqdm.auto") == 0
