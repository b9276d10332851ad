"""Lockstep generation: two models read the same tokens while one takes some of the other's activations."""

from interp.lockstep.agreement import Followed, follow
from interp.lockstep.choosing import Choice, independent
from interp.lockstep.confirm import confirm, confirmation
from interp.lockstep.controls import random_components
from interp.lockstep.moved import EVERYWHERE, WHEN, Moved
from interp.lockstep.run import Written, lockstep
from interp.lockstep.sampling import Sampling

__all__ = [
    "EVERYWHERE",
    "WHEN",
    "Choice",
    "Followed",
    "Moved",
    "Sampling",
    "Written",
    "confirm",
    "confirmation",
    "follow",
    "independent",
    "lockstep",
    "random_components",
]
