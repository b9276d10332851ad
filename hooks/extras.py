"""Packages that only some features need: an extra of the installation brings them, and one error names it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from hooks.errors import FrankenlensError

EXTRAS: Mapping[str, Sequence[str]] = {
    "train": ("trl", "peft", "accelerate", "datasets"),
    "merge": ("mergekit",),
    "math": ("math_verify",),
    "ray": ("ray",),
}
"""Extra to the packages that it brings, as they are imported; pyproject.toml has the versions."""


class MissingPackage(FrankenlensError):
    """A feature was used whose package is not installed; no fault of the data that it was used on."""


def require_installed(feature: str, *packages: str) -> None:
    """Refuse a feature where a package of its own is missing; to be called right before the import of it.

    Args:
        feature: what needs them, as the subject of a sentence: "merging checkpoints".
        packages: as they are imported, of `EXTRAS`.

    Raises:
        MissingPackage: names what is missing, and the extra that brings it.
    """
    missing = [package for package in packages if not _installed(package)]
    if not missing:
        return
    extras = [extra for extra, brought in EXTRAS.items() if set(brought) & set(missing)]
    names = " and ".join(missing).replace("_", "-")
    raise MissingPackage(
        f"{feature} needs {names}, not installed here: pip install 'frankenlens[{','.join(extras)}]' "
        f"(in a clone: pip install -c constraints.txt -e '.[{','.join(extras)}]')"
    )


def _installed(package: str) -> bool:
    """Whether it would be imported; a folder of that name without code (`datasets/`, say) is no package."""
    if package in sys.modules:
        return sys.modules[package] is not None
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
