"""Functional localization: which layers carry a function, by swapping what they see and by leaving them out."""

from interp.localization.ablation import KINDS, Ablation, ablate, layers_of
from interp.localization.accuracy import accuracy
from interp.localization.changes import RULES, with_changes
from interp.localization.outcomes import AMONG, OUTCOMES, Grader, layer_contributions, outcome, outcome_shares
from interp.localization.pairs import SYNTHETIC, FunctionPairs, folder_pairs, synthetic_pairs
from interp.localization.swap import Swap, singles, suffixes, swap_hooks, vision_swap, windows
from interp.localization.together import in_one, swap_table

__all__ = [
    "AMONG",
    "KINDS",
    "OUTCOMES",
    "RULES",
    "SYNTHETIC",
    "Ablation",
    "FunctionPairs",
    "Grader",
    "Swap",
    "ablate",
    "accuracy",
    "folder_pairs",
    "in_one",
    "layer_contributions",
    "layers_of",
    "outcome",
    "outcome_shares",
    "singles",
    "suffixes",
    "swap_hooks",
    "swap_table",
    "synthetic_pairs",
    "vision_swap",
    "windows",
    "with_changes",
]
