"""The one error class that a user's mistake raises, and the suggestion it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FrankenlensError(ValueError):
    """Something the user asked for cannot be done; the message names the thing, the choices and the fix."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """`"Did you mean 'a' or 'b'?"` with the at most `n` choices that look most like `name`; `""` if none does."""
    found = difflib.get_close_matches(name, list(choices), n=n, cutoff=0.5)
    if not found:
        return ""
    *others, last = [repr(choice) for choice in found]
    return f"Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
