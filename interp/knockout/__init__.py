"""Attention knockout: what becomes of a decision when information may not flow from some tokens to others."""

from interp.knockout.attached import Cutting, greedy_knockout, knocked_out, knockout_hooks, missing
from interp.knockout.cut import Cut, Knockout, around, singles, suffixes, windows
from interp.knockout.effects import knockout_effects
from interp.knockout.patches import patch_centres, region
from interp.knockout.places import Place, before_answer, before_reasoning
from interp.knockout.plots import plot_flow, plot_routes
from interp.knockout.route_table import null_route_table, route_table
from interp.knockout.routes import PAPER_ROUTES, ROUTES, routes, up_to_the_answer
from interp.knockout.traces import answered_traces, wrong

__all__ = [
    "PAPER_ROUTES",
    "ROUTES",
    "Cut",
    "Cutting",
    "Knockout",
    "Place",
    "answered_traces",
    "around",
    "before_answer",
    "before_reasoning",
    "greedy_knockout",
    "knocked_out",
    "knockout_effects",
    "knockout_hooks",
    "missing",
    "null_route_table",
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
    "wrong",
]
