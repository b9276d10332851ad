"""The wheels that `make gpu` needs, and one message where some are missing. It imports nothing of the project.

PyTorch is never installed from here: the build that fits the machine's driver is there already.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

WHEELS = {
    "torch": "torch>=2.6",
    "transformers": "transformers>=5",
    "accelerate": "accelerate>=1.10",
    "jaxtyping": "jaxtyping>=0.2.36",
    "beartype": "beartype>=0.18",
    "numpy": "numpy>=1.26",
    "scipy": "scipy>=1.11",
    "xarray": "xarray>=2024.9",
    "pandas": "pandas>=2.2",
    "h5netcdf": "h5netcdf>=1.3",
    "statsmodels": "statsmodels>=0.14",
    "matplotlib": "matplotlib>=3.8",
    "tqdm": "tqdm>=4.66",
    "PIL": "pillow>=10.1",
    "jinja2": "jinja2>=3.1",
    "pytest": "pytest>=8",
}
"""Module to wheel; what these bring along is not named."""


def missing() -> list[str]:
    """Wheels that this Python lacks, or has too old."""
    return [wheel for module, wheel in WHEELS.items() if not _there(module, wheel)]


def _there(module: str, wheel: str) -> bool:
    name, least = wheel.split(">=")
    if find_spec(module) is None:
        return False
    try:
        found = version(name)
    except PackageNotFoundError:  # built from source, without metadata
        return True
    return _numbers(found) >= _numbers(least)


def _numbers(text: str) -> tuple[int, ...]:
    """2.6.0a0+cu128 → (2, 6, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def main() -> int:
    """0 where nothing is missing, else 1 and a line that says what to install."""
    lacking = missing()
    if not lacking:
        return 0
    own = [wheel for wheel in lacking if not wheel.startswith("torch>")]
    told = f"make gpu needs {', '.join(lacking)}, which {sys.executable} lacks."
    if own:
        told += f" Install: {sys.executable} -m pip install {' '.join(repr(one) for one in own)}"
    if len(own) < len(lacking):
        told += " PyTorch comes from pytorch.org, in the build for this machine's driver."
    print(told, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
