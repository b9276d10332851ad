"""What a grader takes from `meta` as a number: tolerance, decimals, iou; and which numbers they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from hooks.errors import FrankenlensError, shown

NUMBERS = ("tolerance", "decimals", "iou")
"""What a grader takes from a row as a number."""
_MOST = {"tolerance": 1e30, "decimals": 100, "iou": 1}
_WHOLE = ("decimals",)


def setting_fault(name: str, value: Any) -> str:
    """What is wrong with a setting; "" where nothing is.

    Example:
        >>> from interp.questions.grading.settings import setting_fault
        >>> setting_fault("decimals", 30000000)
        "'decimals' must be a number of at least 0 and at most 100, found 30000000"
    """
    kind = Integral if name in _WHOLE else Real
    if isinstance(value, kind) and not isinstance(value, bool) and 0 <= value <= _MOST[name]:  # type: ignore[operator]
        return ""
    what = (
        "a whole number" if name in _WHOLE and isinstance(value, Real) and _is_fraction(value) else "a number"
    )
    return f"{name!r} must be {what} of at least 0 and at most {_MOST[name]:g}, found {shown(value)}"


def setting(meta: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting, or what it is where it is not there.

    Raises:
        FrankenlensError: it is no number that it may be.
    """
    value = meta.get(name)
    if value is None:
        return default
    if isinstance(value, float) and name in _WHOLE and value.is_integer() and abs(value) < 2**31:
        value = int(value)
    if fault := setting_fault(name, value):
        raise FrankenlensError(f"the settings of the grader cannot be read: {fault}")
    return value


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and not value.is_integer()
