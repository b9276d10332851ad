"""Attention knockout: what becomes of a decision when information may not flow from some tokens to others."""

from interp.knockout.attached import Cutting, greedy_knockout, knocked_out, knockout_hooks, missing
from interp.knockout.cut import Cut, Knockout, around, singles, suffixes, windows
from interp.knockout.effects import knockout_effects
from interp.knockout.patches import patch_centres, region
from interp.knockout.places import Place, before_answer, before_reasoning
from interp.knockout.plots import plot_flow, plot_routes
from interp.knockout.route_table import route_table
from interp.knockout.routes import PAPER_ROUTES, ROUTES, routes, up_to_the_answer

__all__ = [
    "PAPER_ROUTES",
    "ROUTES",
    "Cut",
    "Cutting",
    "Knockout",
    "Place",
    "around",
    "before_answer",
    "before_reasoning",
    "greedy_knockout",
    "knocked_out",
    "knockout_effects",
    "knockout_hooks",
    "missing",
    "patch_centres",
    "plot_flow",
    "plot_routes",
    "region",
    "route_table",
    "routes",
    "singles",
    "suffixes",
    "up_to_the_answer",
    "windows",
]
