"""What grading an answer comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

from hooks.errors import FrankenlensError, one_line, shown

REFERENCE = 4000
"""Characters of a reference that answers are compared with."""


@dataclass(frozen=True)
class Grade:
    """The verdict on one answer.

    Attributes:
        right: True or False; None where it cannot be told.
        read: what was read as the answer, for people to check.
        why: the reason where `right` is None, or where an answer is wrong because nothing could be read in it.
    """

    right: bool | None
    read: str = ""
    why: str = ""


class Ungraded(FrankenlensError):
    """An answer that is neither right nor wrong: the message says why. To be recorded, not to be counted."""


class Unread(ValueError):
    """An answer that is not read, and why."""


Judge = TypeVar("Judge", bound=Callable[..., Grade])


def always_told(judge: Judge) -> Judge:
    """A judge that comes to a verdict on any two texts: what it cannot work out is ungraded, never an error.

    Hours of generation stand behind an answer; and what a model writes when it collapses nobody foresees.

    Raises:
        FrankenlensError: what it is given are no texts, or a package is missing.
    """

    @wraps(judge)
    def told(answer: str, reference: str, *args: Any, **kwargs: Any) -> Grade:
        for name, given in (("answer", answer), ("reference", reference)):
            if not isinstance(given, str):
                raise FrankenlensError(f"the {name} is {shown(given)}; texts are graded")
        if len(reference) > REFERENCE:
            return Grade(
                None, why=f"the reference has {len(reference):,} characters, and {REFERENCE:,} are compared"
            )
        try:
            return judge(answer, reference, *args, **kwargs)
        except FrankenlensError:
            raise
        except Unread as error:
            return Grade(None, why=str(error))
        except Exception as error:
            return Grade(None, why=f"it cannot be worked out: {type(error).__name__}: {one_line(error)}")

    return cast(Judge, told)
