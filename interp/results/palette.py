"""Colours that mean the same in every figure, on the page and in the notebooks; no other file names one.

A model has one colour: IN is blue and RL is red, wherever either is drawn. What is made of both (a graft, a patched or
steered model, what an intervention moved) is purple; controls are grey; everything else keeps away from blue and red.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.colors import to_hex, to_rgb

BASE, IN, RL = "#8c6d31", "#2166ac", "#b2182b"
MODELS: Mapping[str, str] = {"base": BASE, "in": IN, "rl": RL}
"""Model to its colour, by the names that a `Pair` gives them."""
MIXED = "#7b3294"
"""IN and RL put together: a graft, a patched or steered model, the effect of an intervention."""
INK, CONTROL, PALE = "#333333", "#8c8c8c", "#bdbdbd"
"""What is neither model, what is expected by chance, and further controls."""
MISSING = "#d9d9d9"
"""Cells of a map that nothing was measured for."""
NULLS = (CONTROL, "#595959", PALE)
"""Models that learnt nothing, in turn; their marks tell them apart as well."""
PARTS: Mapping[str, str] = {"block": INK, "attn": "#1b9e77", "mlp": "#d98c0b"}
"""Whole block, attention, MLP."""
OUTCOMES: Mapping[str, str] = {"source": MIXED, "broke": INK, "unchanged": "#66a61e"}
"""What became of an answer (`interp.localization.outcomes`)."""
VERDICTS: Mapping[str, str] = {
    "supported": "#1a7f37",
    "refuted": "#b35806",
    "undecided": "#737373",
    "refused": "#b3b3b3",
}
"""What became of a claim (`interp.hypotheses.verdict`)."""
RANKS = ("#2d3b1f", "#5a7d2a", "#8fb339", "#d8b70a")
"""Ranks of a spectrum, from the first on."""
SERIES = ("#1b9e77", "#66c2a5", "#d98c0b", "#e7298a", "#595959", "#a6761d", MIXED)
"""Methods beside each other."""
DIFFERENCE = "RdBu_r"
"""Colour map of RL − IN: red where RL has more, blue where IN has."""
EFFECT = "PuOr"
"""Colour map of effects and recoveries: purple above 0, orange below."""
SHARE = "Greens"
"""Colour map of shares and probabilities, from 0 to 1."""
NAMED = frozenset(
    to_hex(one)
    for one in (
        *MODELS.values(), MIXED, INK, *NULLS, MISSING, *PARTS.values(), *OUTCOMES.values(), *VERDICTS.values(),
        *RANKS, *SERIES,
    )
)  # fmt: skip
"""Every colour with a meaning."""


def of_model(name: str) -> str:
    """The colour of a model, whatever the case of its name; `INK` for one that is none of the triple."""
    return MODELS.get(name.lower(), INK)


def is_ours(colour: Any) -> bool:
    """Whether a colour is one of `NAMED`, or a grey."""
    red, green, blue = to_rgb(colour)
    return to_hex(colour) in NAMED or max(red, green, blue) - min(red, green, blue) < 1e-6
