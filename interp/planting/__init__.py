"""Planted truth: pairs whose changed components are known, and how well each localizing method finds them."""

from interp.planting.kinds import DRAWN, KINDS, MOST, NULLS, TRAINED, VISIBILITY, Draws
from interp.planting.marking import mark_table, marks
from interp.planting.methods import INTEGRATED, METHODS, Method, Subject, chosen, relative_norm
from interp.planting.plants import (
    CHANGES,
    DECODER,
    EVERYWHERE,
    NOISES,
    WITH_EXPERTS,
    Plant,
    Planted,
    candidates,
    draw,
    on_grid,
    planted,
    planted_and_measured,
    told_apart,
    truth,
)
from interp.planting.trial import claims_possible, effect_of_plant, trial
from interp.planting.wired import WIRED, wired

__all__ = [
    "CHANGES",
    "DECODER",
    "DRAWN",
    "EVERYWHERE",
    "INTEGRATED",
    "KINDS",
    "METHODS",
    "MOST",
    "NOISES",
    "NULLS",
    "TRAINED",
    "VISIBILITY",
    "WIRED",
    "WITH_EXPERTS",
    "Draws",
    "Method",
    "Plant",
    "Planted",
    "Subject",
    "candidates",
    "chosen",
    "claims_possible",
    "draw",
    "effect_of_plant",
    "mark_table",
    "marks",
    "on_grid",
    "planted",
    "planted_and_measured",
    "relative_norm",
    "told_apart",
    "trial",
    "truth",
    "wired",
]
