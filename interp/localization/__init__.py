"""Functional localization: which layers carry a function, by swapping what they see and by leaving them out."""

from interp.localization.ablation import KINDS, Ablation, ablate, accuracy, layers_of
from interp.localization.outcomes import OUTCOMES, outcome, outcome_shares
from interp.localization.swap import Swap, singles, suffixes, swap_hooks, vision_swap, windows

__all__ = [
    "KINDS",
    "OUTCOMES",
    "Ablation",
    "Swap",
    "ablate",
    "accuracy",
    "layers_of",
    "outcome",
    "outcome_shares",
    "singles",
    "suffixes",
    "swap_hooks",
    "vision_swap",
    "windows",
]
