"""The decision that RL changed: where it is on RL's own greedy trace, how large it is, and what it must be beside."""

from interp.decision.controls import (
    Change,
    changed_weights,
    null_changes,
    null_pair_denominator,
    recovery_refused,
    two_by_two,
)
from interp.decision.find import Choice, Grader, find_decisions
from interp.decision.result import Decision, DecisionSet

__all__ = [
    "Change",
    "Choice",
    "Decision",
    "DecisionSet",
    "Grader",
    "changed_weights",
    "find_decisions",
    "null_changes",
    "null_pair_denominator",
    "recovery_refused",
    "two_by_two",
]
