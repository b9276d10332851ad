"""The one error class that a user's mistake raises, and the suggestion it carries."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

SHOWN = 60
"""Characters of a value that a message quotes."""
_LONGEST_NAME = 200


class FrankenlensError(ValueError):
    """Something the user asked for cannot be done; the message names the thing, the choices and the fix."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """`"Did you mean 'a' or 'b'?"` with the at most `n` choices that look most like `name`; `""` if none does."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return ""
    found = difflib.get_close_matches(name, list(choices), n=n, cutoff=0.5)
    if not found:
        return ""
    *others, last = [repr(choice) for choice in found]
    return f"Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def shown(value: Any) -> str:
    """A value as a message quotes it: as Python writes it, or how it begins and how long it is."""
    if isinstance(value, (str, bytes)):
        start = repr(value[:SHOWN])
        unit = "characters" if isinstance(value, str) else "bytes"
        return start if len(value) <= SHOWN else f"{start}… ({len(value):,} {unit})"
    try:
        return reprlib.repr(value)  # it neither goes deep nor on for long
    except Exception:  # an integer of more digits than Python writes, or a class whose repr fails
        return f"a {type(value).__name__} that cannot be written out"


def shown_path(path: Any) -> str:
    """A path as a message names it: as it is, unless nobody could read it."""
    text = str(path)
    return text if len(text) <= 300 and "\0" not in text else shown(text)


def one_line(error: BaseException, longest: int = 300) -> str:
    """What another library's error says, in one line; its name where it says nothing."""
    text = " ".join(str(error)[: 4 * longest].split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} …"
