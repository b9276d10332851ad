"""The decision that RL changed: where it is on RL's own greedy trace, how large it is, and what it must be beside."""

from interp.decision.controls import two_by_two
from interp.decision.find import Choice, Grader, find_decisions
from interp.decision.followed import Followed, followed
from interp.decision.null_pairs import (
    NOISE_PAIRS,
    Change,
    changed_weights,
    null_changes,
    null_pair_denominator,
    own_decisions,
    random_changes,
    recovery_refused,
)
from interp.decision.result import Decision, DecisionSet

__all__ = [
    "NOISE_PAIRS",
    "Change",
    "Choice",
    "Decision",
    "DecisionSet",
    "Followed",
    "Grader",
    "changed_weights",
    "find_decisions",
    "followed",
    "null_changes",
    "null_pair_denominator",
    "own_decisions",
    "random_changes",
    "recovery_refused",
    "two_by_two",
]
