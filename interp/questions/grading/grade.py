"""What grading an answer comes to."""

from __future__ import annotations

from dataclasses import dataclass

from hooks.errors import FrankenlensError


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
