"""Lockstep generation: two models read the same tokens while one takes some of the other's activations."""

from interp.lockstep.agreement import Followed, follow
from interp.lockstep.confirm import confirm, confirmation
from interp.lockstep.controls import random_components
from interp.lockstep.moved import EVERYWHERE, WHEN, Moved
from interp.lockstep.run import Written, lockstep
from interp.lockstep.sampling import Sampling

__all__ = [
    "EVERYWHERE",
    "WHEN",
    "Followed",
    "Moved",
    "Sampling",
    "Written",
    "confirm",
    "confirmation",
    "follow",
    "lockstep",
    "random_components",
]
