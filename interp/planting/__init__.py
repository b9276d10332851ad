"""Planted truth: pairs whose changed components are known, and how well each localizing method finds them."""

from interp.planting.methods import INTEGRATED, METHODS, Method, Subject, chosen, relative_norm
from interp.planting.plants import (
    CHANGES,
    DECODER,
    EVERYWHERE,
    NOISES,
    Plant,
    candidates,
    draw,
    planted,
    truth,
)
from interp.planting.trial import effect_of_plant, trial

__all__ = [
    "CHANGES",
    "DECODER",
    "EVERYWHERE",
    "INTEGRATED",
    "METHODS",
    "NOISES",
    "Method",
    "Plant",
    "Subject",
    "candidates",
    "chosen",
    "draw",
    "effect_of_plant",
    "planted",
    "relative_norm",
    "trial",
    "truth",
]
